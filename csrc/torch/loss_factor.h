// What the gradient of a loss will be multiplied by: programs that accumulate gradients, or average by hand, multiply
// each loss by the same number. Known beforehand, it costs nothing where the gradient is written.
#pragma once

#include <array>
#include <cmath>  // fabs
#include <cstdint>
#include <mutex>

namespace fastopt {

// The factor that the last loss of the same kind had; 1 at first. A gradient is the same whether its factor was
// foreseen or not, for another factor than the foreseen one computes it anew.
class LossFactors {
 public:
  // Of losses that are alike in this number.
  double foreseen(uint64_t kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Entry& entry = entry_of(kind);
    return entry.kind == kind ? entry.factor : 1;
  }
  void remember(uint64_t kind, double factor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The gradient may have to be divided by it again.
    const bool is_plain = std::fabs(factor) >= 0x1p-40 && std::fabs(factor) <= 0x1p40;
    entry_of(kind) = {kind, is_plain ? factor : 1};
  }

 private:
  struct Entry {
    uint64_t kind = 0;
    double factor = 1;
  };
  Entry& entry_of(uint64_t kind) { return entries_[kind % entries_.size()]; }

  std::array<Entry, 61> entries_;
  std::mutex mutex_;
};

}  // namespace fastopt
