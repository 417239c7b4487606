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
  places_.clear();
  rules_.clear();
  written_.clear();
  grad_impls_.clear();
  copies_.clear();
  numel_ = 0;
  why_not_ = "";
}

size_t UpdateBatch::place_of(c10::Device device, Backend backend) {
  for (size_t i = 0; i < devices_.size(); ++i) {
    if (devices_[i].device == device && devices_[i].backend == backend) return i;
  }
  devices_.push_back({device, backend, {}});
  return devices_.size() - 1;
}

bool UpdateBatch::has_cpu() const {
  for (const int16_t place : places_) {
    if (devices_[place].backend == Backend::kCpu) return true;
  }
  return false;
}

bool UpdateBatch::is_capturing() const {
  for (const Place& place : devices_) {
    if (place.backend == Backend::kCuda && CudaDevice(place.device).is_capturing()) return true;
  }
  return false;
}

void UpdateBatch::count_on_device(int64_t i, const at::Tensor& step) {
  slabs_[i].step = step.mutable_data_ptr();
  slabs_[i].is_step_double = step.scalar_type() == at::kDouble;
  written_.push_back(step.unsafeGetTensorImpl());
}

bool UpdateBatch::add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* const* states, int n_states) {
  const auto dtype = dtype_of(param);
  const Backend backend = backend_of(param);
  const auto lies_with_param = [&](const at::Tensor& tensor) {
    return backend_of(tensor) == backend && (backend == Backend::kCpu || tensor.device() == param.device());
  };
  if (backend == Backend::kNone || param.is_inference()) return refuse("a parameter is not an ordinary tensor");
  if (!lies_with_param(grad)) return refuse("a gradient is not an ordinary tensor on its parameter's device");
  if (!dtype) return refuse("a parameter's dtype has no kernel");
  if (grad.scalar_type() != param.scalar_type()) return refuse("a gradient's dtype is not its parameter's");
  if (grad.sizes() != param.sizes()) return refuse("a gradient's shape is not its parameter's");
  if (!param.is_contiguous() && !param.is_non_overlapping_and_dense()) return refuse("a parameter is not dense");

  Slab slab{};
  slab.numel = param.numel();
  slab.dtype = slab.state_dtype = *dtype;
  for (int s = 0; s < n_states; ++s) {
    const at::Tensor& state = *states[s];
    if (!lies_with_param(state) || state.is_inference()) {
      return refuse("a state is not an ordinary tensor on its parameter's device");
    }
    if (s == 0) slab.state_dtype = dtype_of(state).value_or(*dtype);
    if (dtype_of(state) != slab.state_dtype) return refuse("a state's dtype is not its parameter's");
    if (state.sizes() != param.sizes()) return refuse("a state's shape is not its parameter's");
    if (!same_layout(state, param)) return refuse("a state's layout is not its parameter's");
    slab.state[s] = state.mutable_data_ptr();
  }
  if (slab.state_dtype != slab.dtype &&
      (backend == Backend::kCpu || !cuda::has_update_kernel(slab.dtype, slab.state_dtype))) {
    return refuse("a state's dtype is not its parameter's");
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
  places_.push_back(static_cast<int16_t>(place_of(param.device(), backend)));
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
    fingerprint = (fingerprint ^ reinterpret_cast<uintptr_t>(slab.step)) * 0x9e3779b97f4a7c15ull;
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

void UpdateBatch::run(const at::Tensor* grad_scale, const at::Tensor* found_inf) {
  bool is_all_cpu = true;
  for (const int16_t place : places_) is_all_cpu &= devices_[place].backend == Backend::kCpu;
  if (is_all_cpu) {
    cpu::update(slabs_.data(), size(), rules_.data(), torch_threads());
  } else {
    std::vector<Slab> on_cpu;
    for (int64_t i = 0; i < size(); ++i) {
      if (!is_cuda(i)) on_cpu.push_back(slabs_[i]);
    }
    for (size_t place = 0; place < devices_.size(); ++place) {
      if (devices_[place].backend == Backend::kCuda) {
        run_cuda(devices_[place], static_cast<int16_t>(place), grad_scale, found_inf);
      }
    }
    cpu::update(on_cpu.data(), static_cast<int64_t>(on_cpu.size()), rules_.data(), torch_threads());
    ++kernel_calls().cuda;
  }
  for (c10::TensorImpl* tensor : written_) tensor->bump_version();
  if (grad_scale) {
    for (c10::TensorImpl* tensor : grad_impls_) tensor->bump_version();
  }
  ++kernel_calls().update;
}

void UpdateBatch::run_cuda(Place& place, int16_t index, const at::Tensor* grad_scale, const at::Tensor* found_inf) {
  std::vector<const Slab*> slabs;
  for (int64_t i = 0; i < size(); ++i) {
    if (places_[i] == index) slabs.push_back(&slabs_[i]);
  }
  if (slabs.empty()) return;
  // A scaler's numbers come from one device and serve all.
  const auto number_on = [&](const at::Tensor* number) {
    return number ? number->to(place.device, at::kFloat, /*non_blocking=*/true) : at::Tensor();
  };
  const at::Tensor scale = number_on(grad_scale), found = number_on(found_inf);
  place.updater.run(slabs, rules_,
                    {scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                     found.defined() ? found.const_data_ptr<float>() : nullptr},
                    place.device);
}

}  // namespace fastopt
