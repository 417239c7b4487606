#include "torch/update_batch.h"

#include <ATen/ops/empty_strided.h>

#include <algorithm>  // sort

#include "cpu/update.h"

namespace fastopt {
namespace {

struct Interval {
  const char* begin;
  const char* end;
};

Interval memory_of(const c10::TensorImpl* tensor) {
  const char* begin = static_cast<const char*>(tensor->data());
  return {begin, begin + tensor->numel() * tensor->itemsize()};
}

bool any_overlap(std::vector<Interval>& intervals) {
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < intervals.size(); ++i) {
    if (intervals[i].begin < intervals[i - 1].end) return true;
  }
  return false;
}

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides();
}

// A small open-addressing set of storages, sized to stay less than half full.
size_t slot_of(const std::vector<const void*>& set, const void* key) {
  size_t slot = (reinterpret_cast<uintptr_t>(key) >> 4) * 0x9e3779b97f4a7c15ull >> 20 & (set.size() - 1);
  while (set[slot] != nullptr && set[slot] != key) slot = (slot + 1) & (set.size() - 1);
  return slot;
}

}  // namespace

void UpdateBatch::clear() {
  slabs_.clear();
  rules_.clear();
  written_.clear();
  grad_impls_.clear();
  copies_.clear();
  numel_ = 0;
  why_not_ = "";
}

bool UpdateBatch::add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* const* states, int n_states) {
  const auto dtype = dtype_of(param);
  if (!is_plain_cpu(param) || param.is_inference()) return refuse("a parameter is not an ordinary CPU tensor");
  if (!is_plain_cpu(grad)) return refuse("a gradient is not an ordinary CPU tensor");
  if (!dtype) return refuse("a parameter's dtype has no kernel");
  if (grad.scalar_type() != param.scalar_type()) return refuse("a gradient's dtype is not its parameter's");
  if (grad.sizes() != param.sizes()) return refuse("a gradient's shape is not its parameter's");
  if (!param.is_contiguous() && !param.is_non_overlapping_and_dense()) return refuse("a parameter is not dense");

  Slab slab{};
  slab.numel = param.numel();
  slab.dtype = *dtype;
  for (int s = 0; s < n_states; ++s) {
    const at::Tensor& state = *states[s];
    if (!is_plain_cpu(state) || state.is_inference()) return refuse("a state is not an ordinary CPU tensor");
    if (state.scalar_type() != param.scalar_type()) return refuse("a state's dtype is not its parameter's");
    if (state.sizes() != param.sizes()) return refuse("a state's shape is not its parameter's");
    if (!same_layout(state, param)) return refuse("a state's layout is not its parameter's");
    slab.state[s] = state.mutable_data_ptr();
  }
  const at::Tensor* laid_out = &grad;
  if (!same_layout(grad, param)) {
    copies_.push_back(at::empty_strided(param.sizes(), param.strides(), param.options().requires_grad(false)));
    copies_.back().copy_(grad.detach());
    laid_out = &copies_.back();
  }
  slab.param = param.mutable_data_ptr();
  slab.grad = laid_out->const_data_ptr();
  slabs_.push_back(slab);
  grad_impls_.push_back(laid_out->unsafeGetTensorImpl());
  written_.push_back(param.unsafeGetTensorImpl());
  for (int s = 0; s < n_states; ++s) written_.push_back(states[s]->unsafeGetTensorImpl());
  numel_ += slab.numel;
  return true;
}

bool UpdateBatch::has_overlap() {
  uint64_t fingerprint = written_.size();
  for (const Slab& slab : slabs_) {
    fingerprint = (fingerprint ^ reinterpret_cast<uintptr_t>(slab.param)) * 0x9e3779b97f4a7c15ull;
    for (const void* state : slab.state)
      fingerprint = (fingerprint ^ reinterpret_cast<uintptr_t>(state)) * 0x9e3779b97f4a7c15ull;
    fingerprint = (fingerprint ^ static_cast<uint64_t>(slab.numel)) * 0x9e3779b97f4a7c15ull;
    fingerprint ^= fingerprint >> 29;
  }
  if (fingerprint != checked_fingerprint_) {
    std::vector<Interval> intervals;
    size_t capacity = 16;
    while (capacity < 2 * written_.size()) capacity *= 2;
    storages_.assign(capacity, nullptr);
    for (const c10::TensorImpl* tensor : written_) {
      if (tensor->numel() == 0) continue;
      intervals.push_back(memory_of(tensor));
      const void* storage = tensor->storage().unsafeGetStorageImpl();
      storages_[slot_of(storages_, storage)] = storage;
    }
    checked_overlap_ = any_overlap(intervals);
    checked_fingerprint_ = fingerprint;
  }
  if (checked_overlap_) return true;

  // A gradient in a storage of its own overlaps nothing.
  bool shares_storage = false;
  for (const c10::TensorImpl* grad : grad_impls_) {
    shares_storage |= storages_[slot_of(storages_, grad->storage().unsafeGetStorageImpl())] != nullptr;
  }
  if (!shares_storage) return false;
  for (const c10::TensorImpl* grad : grad_impls_) {
    const Interval read = memory_of(grad);
    for (const c10::TensorImpl* tensor : written_) {
      const Interval write = memory_of(tensor);
      if (read.begin < write.end && write.begin < read.end) return true;
    }
  }
  return false;
}

int32_t UpdateBatch::add_rule(const RuleValue& rule) {
  rules_.push_back(rule);
  return static_cast<int32_t>(rules_.size()) - 1;
}

void UpdateBatch::run() {
  cpu::update(slabs_.data(), size(), rules_.data(), torch_threads());
  for (c10::TensorImpl* tensor : written_) tensor->bump_version();
  ++kernel_calls().update;
}

}  // namespace fastopt
