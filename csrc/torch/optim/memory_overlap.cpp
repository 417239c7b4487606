#include "torch/optim/memory_overlap.h"

#include <algorithm>  // max, sort, upper_bound

namespace fastopt {
namespace {

size_t slot_of(const std::vector<const void*>& set, const void* key) {
  size_t slot = (reinterpret_cast<uintptr_t>(key) >> 4) * 0x9e3779b97f4a7c15ull >> 20 & (set.size() - 1);
  while (set[slot] != nullptr && set[slot] != key) slot = (slot + 1) & (set.size() - 1);
  return slot;
}

}  // namespace

bool MemoryOverlap::is_found() {
  if (!is_checked_ || n_checked_ != written().size()) check_written();
  if (has_overlap_) return true;
  for (const auto& [memory, tensor, held] : reads_) {
    // Memory of its own, in a storage that nothing is written to, overlaps with nothing.
    const bool is_apart = is_all_own_ && memory.is_own && storages_[slot_of(storages_, memory.storage)] == nullptr;
    if (!is_apart && is_written(memory)) return true;
  }
  return false;
}

void MemoryOverlap::grow() {
  const size_t n_used = written().size();
  written_.resize(std::max<size_t>(2 * written_.size(), 16));
  next_ = written_.data() + n_used;
  end_ = written_.data() + written_.size();
}

void MemoryOverlap::check_written() {
  is_checked_ = true;
  n_checked_ = written().size();
  size_t capacity = 16;
  while (capacity < 2 * n_checked_) capacity *= 2;
  storages_.assign(capacity, nullptr);
  sorted_.clear();
  is_all_own_ = true;
  for (const auto& [memory, tensor] : written()) {
    if (memory.begin == memory.end) continue;
    sorted_.push_back(memory);
    storages_[slot_of(storages_, memory.storage)] = memory.storage;
    is_all_own_ &= memory.is_own;
  }
  std::sort(sorted_.begin(), sorted_.end(), [](const Memory& a, const Memory& b) { return a.begin < b.begin; });
  has_overlap_ = false;
  for (size_t i = 1; i < sorted_.size(); ++i) has_overlap_ |= sorted_[i].begin < sorted_[i - 1].end;
}

// Written ranges do not overlap each other, so of those that begin before the end of a read range, the last one ends
// last.
bool MemoryOverlap::is_written(const Memory& read) const {
  if (read.begin == read.end) return false;
  const auto after = std::upper_bound(sorted_.begin(), sorted_.end(), read.end,
                                      [](const char* end, const Memory& memory) { return end <= memory.begin; });
  return after != sorted_.begin() && (after - 1)->end > read.begin;
}

}  // namespace fastopt
