#include "torch/optim/update_batch.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/COW.h>

#include <algorithm>  // min

#include "cpu/update.h"

namespace fastopt {
namespace {

// How far ahead of the one that is read a parameter's tensors are fetched.
constexpr int64_t kParamsAhead = 4;

// How a tensor compares with its parameter.
enum class LayoutMatch { kShapeDiffers, kLayoutDiffers, kSame };

LayoutMatch layout_match(const at::Tensor& tensor, const at::Tensor& param) {
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const at::IntArrayRef param_sizes = param.sizes(), param_strides = param.strides();
  if (sizes.size() != param_sizes.size()) return LayoutMatch::kShapeDiffers;
  bool has_same_strides = true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != param_sizes[d]) return LayoutMatch::kShapeDiffers;
    has_same_strides &= strides[d] == param_strides[d];
  }
  const bool lies_alike = has_same_strides || (tensor.is_contiguous() && param.is_contiguous());
  return lies_alike ? LayoutMatch::kSame : LayoutMatch::kLayoutDiffers;
}

bool is_lazy_clone(const at::Tensor& tensor) {
  return c10::impl::cow::is_cow_data_ptr(tensor.unsafeGetTensorImpl()->unsafe_storage().data_ptr());
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
  n_threads_ = 1;
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

// Why no kernel can update the tensors, or null.
const char* UpdateBatch::find_fault(const ParamTensors& tensors, Kind& kind) {
  const at::Tensor &param = *tensors.param, &grad = *tensors.grad;
  const Backend backend = backend_of(param);
  const auto lies_with_param = [&](const at::Tensor& tensor) {
    if (backend == Backend::kCpu) return is_plain_cpu(tensor);
    return backend_of(tensor) == backend && tensor.device() == param.device();
  };
  if (backend == Backend::kNone || param.is_inference()) return "a parameter is not an ordinary tensor";
  if (!lies_with_param(grad)) return "a gradient is not an ordinary tensor on its parameter's device";
  const at::ScalarType type = param.scalar_type();
  const auto dtype = dtype_of(type);
  if (!dtype) return "a parameter's dtype has no kernel";
  if (grad.scalar_type() != type) return "a gradient's dtype is not its parameter's";
  const LayoutMatch grad_likeness = layout_match(grad, param);
  if (grad_likeness == LayoutMatch::kShapeDiffers) return "a gradient's shape is not its parameter's";
  if (!param.is_contiguous() && !param.is_non_overlapping_and_dense()) return "a parameter is not dense";
  at::ScalarType state_type = type;
  for (int s = 0; s < tensors.n_states; ++s) {
    const at::Tensor& state = *tensors.kept[s];
    if (!lies_with_param(state) || state.is_inference()) {
      return "a state is not an ordinary tensor on its parameter's device";
    }
    if (s == 0) state_type = state.scalar_type();
    if (state.scalar_type() != state_type) return "a state's dtype is not its parameter's";
    const LayoutMatch state_likeness = layout_match(state, param);
    if (state_likeness == LayoutMatch::kShapeDiffers) return "a state's shape is not its parameter's";
    if (state_likeness == LayoutMatch::kLayoutDiffers) return "a state's layout is not its parameter's";
  }
  const auto state_dtype = state_type == type ? dtype : dtype_of(state_type);
  if (state_dtype != dtype &&
      (backend == Backend::kCpu || !state_dtype || !cuda::has_update_kernel(*dtype, *state_dtype))) {
    return "a state's dtype is not its parameter's";
  }
  kind = {backend, *dtype, *state_dtype, grad_likeness == LayoutMatch::kSame};
  return nullptr;
}

// Fetches what the last step knew a few parameters further, at the same distance in its list: it may be gone.
void UpdateBatch::fetch_ahead(const MemoryOverlap::Written* written, int n_written) const {
  const MemoryOverlap::Written* const ahead = written + kParamsAhead * n_written;
  if (ahead + n_written > overlap_.end_of_room()) return;
  for (int i = 0; i < n_written; ++i) {
    fetch(ahead[i].tensor, sizeof(c10::TensorImpl));
    fetch(ahead[i].memory.storage, sizeof(c10::StorageImpl));
  }
}

// `grad` is laid out as the parameter. Returns whether what is written is another than in the last step.
bool UpdateBatch::fill(TensorUpdate& item, const ParamTensors& tensors, const at::Tensor& grad, const Kind& kind,
                       MemoryOverlap::Written* written, MemoryOverlap::Read& read) const {
  const c10::DeleterFnPtr own_deleter = devices_[place_].own_deleter;
  fetch_ahead(written, tensors.n_written());
  const at::Tensor& param = *tensors.param;
  const int64_t numel = param.numel(), item_bytes = bytes_of(kind.dtype), state_item_bytes = bytes_of(kind.state_dtype);
  // Everything that can raise comes first.
  const Memory grad_memory =
      memory_of(grad, numel * item_bytes, item_bytes, own_deleter, /*is_written=*/false, "a gradient");
  const Memory param_memory =
      memory_of(param, numel * item_bytes, item_bytes, own_deleter, /*is_written=*/true, "a parameter");
  std::array<Memory, kMaxKept> kept;
  for (int s = 0; s < tensors.n_states; ++s) {
    kept[s] = memory_of(*tensors.kept[s], numel * state_item_bytes, state_item_bytes, own_deleter,
                        /*is_written=*/true, "a state");
  }
  uint8_t double_scalars = 0;
  for (int k = 0; k < tensors.n_scalars; ++k) {
    const at::Tensor& scalar = *tensors.kept[tensors.n_states + k];
    const auto n_bytes = static_cast<int64_t>(scalar.itemsize());
    kept[tensors.n_states + k] =
        memory_of(scalar, n_bytes, n_bytes, tensors.has_scalars_on_device ? own_deleter : cpu_deleter_,
                  /*is_written=*/true, "a scalar of a state");
    double_scalars |= static_cast<uint8_t>((n_bytes == sizeof(double)) << k);
  }
  replace(item.numel, numel);
  replace(item.dtype, kind.dtype);
  replace(item.state_dtype, kind.state_dtype);
  replace(item.has_scalars_on_device, tensors.has_scalars_on_device);
  replace(item.double_scalars, double_scalars);
  replace(item.grad, static_cast<const void*>(grad_memory.begin));
  replace(item.param, static_cast<void*>(param_memory.begin));
  read = {grad_memory, grad.unsafeGetTensorImpl(), grad.unsafeGetTensorImpl()->unsafe_storage()};
  bool is_changed = written[0].replace(param_memory, param.unsafeGetTensorImpl());
  for (int k = 0; k < tensors.n_kept(); ++k) {
    replace(item.kept[k], static_cast<void*>(kept[k].begin));
    is_changed |= written[k + 1].replace(kept[k], tensors.kept[k]->unsafeGetTensorImpl());
  }
  return is_changed;
}

bool UpdateBatch::add(const ParamTensors& tensors) {
  Kind kind;
  if (const char* fault = find_fault(tensors, kind)) return refuse(fault);
  const at::Tensor &param = *tensors.param, &grad = *tensors.grad;
  if (devices_.empty() || devices_[place_].device != param.device() || devices_[place_].backend != kind.backend) {
    place_ = place_of(param.device(), kind.backend);
  }
  const at::Tensor* dense_grad = &grad;
  if (!kind.has_grad_same_layout) {
    check_backed(grad, "a gradient");
    const auto [begin, end] = memory_range(grad);
    overlap_.add_read({begin, end, grad.storage().unsafeGetStorageImpl(), /*is_own=*/false},
                      grad.unsafeGetTensorImpl());
    copies_.push_back(at::empty_strided(param.sizes(), param.strides(), param.options().requires_grad(false)));
    copies_.back().copy_(grad.detach());
    dense_grad = &copies_.back();
  }
  if (updates_.size() == places_.size()) updates_.emplace_back();
  TensorUpdate& item = updates_[places_.size()];
  MemoryOverlap::Written* const written = overlap_.written_room(tensors.n_written());
  overlap_.note_changes(fill(item, tensors, *dense_grad, kind, written, *overlap_.read_room(1)));
  places_.push_back(static_cast<int16_t>(place_));
  numel_ += item.numel;
  return true;
}

UpdateBatch::Places UpdateBatch::make_places(int64_t n_params, int n_written) {
  place_ = place_of(c10::Device(c10::kCPU), Backend::kCpu);
  places_.assign(n_params, static_cast<int16_t>(place_));
  if (updates_.size() < places_.size()) updates_.resize(places_.size());
  return {n_written, overlap_.written_room(n_params * n_written), overlap_.read_room(n_params)};
}

bool UpdateBatch::fill_at(int64_t i, const ParamTensors& tensors, const Places& places, bool& is_changed) {
  Kind kind;
  if (tensors.n_written() != places.n_written || find_fault(tensors, kind) || kind.backend != Backend::kCpu ||
      !kind.has_grad_same_layout) {
    return false;
  }
  // Two tensors whose one copy is due may not get it on two threads.
  if (is_lazy_clone(*tensors.param)) return false;
  for (int k = 0; k < tensors.n_kept(); ++k) {
    if (is_lazy_clone(*tensors.kept[k])) return false;
  }
  is_changed |= fill(updates_[i], tensors, *tensors.grad, kind, places.written + i * places.n_written, places.reads[i]);
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

int32_t UpdateBatch::add_rule(const PackedRule& rule) {
  rules_.push_back(rule);
  return static_cast<int32_t>(rules_.size()) - 1;
}

void UpdateBatch::run(const at::Tensor* grad_scale, const at::Tensor* found_inf) {
  bool is_all_cpu = true;
  for (const int16_t place : places_) is_all_cpu &= devices_[place].backend == Backend::kCpu;
  if (is_all_cpu) {
    cpu::update(updates_.data(), size(), rules_.data(), static_cast<int64_t>(rules_.size()), torch_threads());
  } else {
    std::vector<TensorUpdate> on_cpu;
    for (int64_t i = 0; i < size(); ++i) {
      if (!is_cuda(i)) on_cpu.push_back(updates_[i]);
    }
    for (size_t place = 0; place < devices_.size(); ++place) {
      if (devices_[place].backend == Backend::kCuda) {
        run_cuda(devices_[place], static_cast<int16_t>(place), grad_scale, found_inf);
      }
    }
    cpu::update(on_cpu.data(), static_cast<int64_t>(on_cpu.size()), rules_.data(), static_cast<int64_t>(rules_.size()),
                torch_threads());
    ++kernel_calls().cuda;
  }
  note_written();
  if (grad_scale) {
    for (const auto& [memory, tensor, held] : overlap_.reads()) tensor->bump_version();
  }
  ++kernel_calls().update;
}

// Writes the scalars in CPU memory and bumps versions, each on the thread that found the tensor and has it in its
// caches.
void UpdateBatch::note_written() {
  const auto written = overlap_.written();
  const auto n = static_cast<int64_t>(written.size());
  cpu::Threads threads = torch_threads();
  threads.count = std::min(threads.count, n_threads_);
  cpu::run_tasks(threads, threads.count, [&](int64_t part) {
    for (int64_t i = part * size() / threads.count; i < (part + 1) * size() / threads.count; ++i) {
      const TensorUpdate& item = updates_[i];
      if (item.has_scalars_on_device) continue;
      const PackedRule& rule = rules_[item.rule];
      for (int k = 0; k < rule.n_scalars; ++k) {
        write_scalar(item.kept[rule.n_states + k], item.double_scalars >> k & 1, rule.scalars_after[k]);
      }
    }
    for (int64_t i = part * n / threads.count; i < (part + 1) * n / threads.count; ++i) {
      written[i].tensor->bump_version();
    }
  });
}

void UpdateBatch::run_cuda(Place& place, int16_t index, const at::Tensor* grad_scale, const at::Tensor* found_inf) {
  std::vector<const TensorUpdate*> updates;
  for (int64_t i = 0; i < size(); ++i) {
    if (places_[i] == index) updates.push_back(&updates_[i]);
  }
  if (updates.empty()) return;
  // A scaler's numbers come from one device and serve all.
  const auto number_on = [&](const at::Tensor* number) {
    return number ? number->to(place.device, at::kFloat, /*non_blocking=*/true) : at::Tensor();
  };
  const at::Tensor scale = number_on(grad_scale), found = number_on(found_inf);
  place.updater.run(updates, rules_,
                    {scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                     found.defined() ? found.const_data_ptr<float>() : nullptr},
                    place.device);
}

}  // namespace fastopt
