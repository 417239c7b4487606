#include "torch/update_batch.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/Allocator.h>

#include "cpu/update.h"

namespace fastopt {
namespace {

// How a tensor compares with its parameter.
enum class Likeness { kOtherShape, kOtherLayout, kSame };

Likeness likeness(const at::Tensor& tensor, const at::Tensor& param) {
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const at::IntArrayRef param_sizes = param.sizes(), param_strides = param.strides();
  if (sizes.size() != param_sizes.size()) return Likeness::kOtherShape;
  bool has_same_strides = true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != param_sizes[d]) return Likeness::kOtherShape;
    has_same_strides &= strides[d] == param_strides[d];
  }
  const bool lies_alike = has_same_strides || (tensor.is_contiguous() && param.is_contiguous());
  return lies_alike ? Likeness::kSame : Likeness::kOtherLayout;
}

}  // namespace

void UpdateBatch::clear() {
  places_.clear();
  rules_.clear();
  copies_.clear();
  held_tensors_.clear();
  held_storages_.clear();
  overlap_.clear();
  numel_ = 0;
  why_not_ = "";
}

size_t UpdateBatch::place_of(c10::Device device, Backend backend) {
  for (size_t i = 0; i < devices_.size(); ++i) {
    if (devices_[i].device == device && devices_[i].backend == backend) return i;
  }
  devices_.push_back({device, backend, c10::GetAllocator(device.type())->raw_deleter(), {}});
  return devices_.size() - 1;
}

bool UpdateBatch::has(Backend backend) const {
  for (const int16_t place : places_) {
    if (devices_[place].backend == backend) return true;
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
  const int64_t n_bytes = static_cast<int64_t>(step.itemsize());
  const Memory memory =
      memory_of(step, n_bytes, n_bytes, devices_[places_[i]].own_deleter, /*is_written=*/true, "a step");
  slabs_[i].step = memory.begin;
  slabs_[i].is_step_double = step.scalar_type() == at::kDouble;
  overlap_.add_written(memory, step.unsafeGetTensorImpl());
}

bool UpdateBatch::add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* const* states, int n_states) {
  const Backend backend = backend_of(param);
  const auto lies_with_param = [&](const at::Tensor& tensor) {
    if (backend == Backend::kCpu) return is_plain_cpu(tensor);
    return backend_of(tensor) == backend && tensor.device() == param.device();
  };
  if (backend == Backend::kNone || param.is_inference()) return refuse("a parameter is not an ordinary tensor");
  if (!lies_with_param(grad)) return refuse("a gradient is not an ordinary tensor on its parameter's device");
  const at::ScalarType type = param.scalar_type();
  const auto dtype = dtype_of(type);
  if (!dtype) return refuse("a parameter's dtype has no kernel");
  if (grad.scalar_type() != type) return refuse("a gradient's dtype is not its parameter's");
  const Likeness grad_likeness = likeness(grad, param);
  if (grad_likeness == Likeness::kOtherShape) return refuse("a gradient's shape is not its parameter's");
  if (!param.is_contiguous() && !param.is_non_overlapping_and_dense()) return refuse("a parameter is not dense");
  at::ScalarType state_type = type;
  for (int s = 0; s < n_states; ++s) {
    const at::Tensor& state = *states[s];
    if (!lies_with_param(state) || state.is_inference()) {
      return refuse("a state is not an ordinary tensor on its parameter's device");
    }
    if (s == 0) state_type = state.scalar_type();
    if (state.scalar_type() != state_type) return refuse("a state's dtype is not its parameter's");
    const Likeness state_likeness = likeness(state, param);
    if (state_likeness == Likeness::kOtherShape) return refuse("a state's shape is not its parameter's");
    if (state_likeness == Likeness::kOtherLayout) return refuse("a state's layout is not its parameter's");
  }
  const auto state_dtype = state_type == type ? dtype : dtype_of(state_type);
  if (state_dtype != dtype &&
      (backend == Backend::kCpu || !state_dtype || !cuda::has_update_kernel(*dtype, *state_dtype))) {
    return refuse("a state's dtype is not its parameter's");
  }
  if (devices_.empty() || devices_[place_].device != param.device() || devices_[place_].backend != backend) {
    place_ = place_of(param.device(), backend);
  }

  const c10::DeleterFnPtr own_deleter = devices_[place_].own_deleter;
  if (slabs_.size() == places_.size()) slabs_.emplace_back();
  Slab& slab = slabs_[places_.size()];
  const int64_t numel = param.numel();
  replace(slab.numel, numel);
  replace(slab.dtype, *dtype);
  replace(slab.state_dtype, *state_dtype);
  replace(slab.step, static_cast<void*>(nullptr));
  const int64_t item_bytes = bytes_of(*dtype), state_item_bytes = bytes_of(*state_dtype);
  const at::Tensor* laid_out = &grad;
  if (grad_likeness == Likeness::kOtherLayout) {
    check_backed(grad, "a gradient");
    const auto [begin, end] = memory_range(grad);
    overlap_.add_read({begin, end, grad.storage().unsafeGetStorageImpl(), /*is_own=*/false},
                      grad.unsafeGetTensorImpl());
    copies_.push_back(at::empty_strided(param.sizes(), param.strides(), param.options().requires_grad(false)));
    copies_.back().copy_(grad.detach());
    laid_out = &copies_.back();
  }
  const Memory read =
      memory_of(*laid_out, numel * item_bytes, item_bytes, own_deleter, /*is_written=*/false, "a gradient");
  overlap_.add_read(read, laid_out->unsafeGetTensorImpl());
  replace(slab.grad, static_cast<const void*>(read.begin));
  const auto write = [&](const at::Tensor& tensor, int64_t bytes, const char* name) {
    const Memory memory = memory_of(tensor, numel * bytes, bytes, own_deleter, /*is_written=*/true, name);
    overlap_.add_written(memory, tensor.unsafeGetTensorImpl());
    return static_cast<void*>(memory.begin);
  };
  replace(slab.param, write(param, item_bytes, "a parameter"));
  for (int s = 0; s < n_states; ++s) replace(slab.state[s], write(*states[s], state_item_bytes, "a state"));
  places_.push_back(static_cast<int16_t>(place_));
  numel_ += numel;
  return true;
}

void UpdateBatch::hold() {
  const auto hold_tensor = [&](c10::TensorImpl* tensor) {
    held_tensors_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor));
  };
  for (const auto& [memory, tensor] : overlap_.written()) {
    hold_tensor(tensor);
    held_storages_.push_back(tensor->storage());
  }
  for (const auto& [memory, tensor, held] : overlap_.reads()) hold_tensor(tensor);
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
  for (const auto& [memory, tensor] : overlap_.written()) tensor->bump_version();
  if (grad_scale) {
    for (const auto& [memory, tensor, held] : overlap_.reads()) tensor->bump_version();
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
