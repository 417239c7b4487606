#include "torch/cross_entropy.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <type_traits>  // is_same_v

#include "torch/context.h"
#include "torch/cross_entropy_cuda.h"
#include "torch/cross_entropy_kernel.h"
#include "torch/operators.h"

namespace fastopt {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

const at::Tensor* pointer_to(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

at::Tensor torch_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  return at::cross_entropy_loss_symint(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
}

// --- The operators' kernels ----------------------------------------------------------------------------------------

GradientMemory memory_for(bool wants_grad) { return wants_grad ? GradientMemory::kFresh : GradientMemory::kNone; }

std::tuple<at::Tensor, at::Tensor> forward_kernel(const at::Tensor& input, const at::Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                  double label_smoothing, bool wants_grad) {
  auto [loss, grad] = cross_entropy_kernel(
      {input, target, pointer_to(weight), reduction, ignore_index, label_smoothing}, memory_for(wants_grad));
  if (!grad.defined()) grad = at::empty({0}, input.options().requires_grad(false));
  return {loss, grad};
}

// Multiplies the gradient of the loss by the loss's own gradient: a number, or one for each position.
at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& grad_output, at::ScalarType dtype, bool may_reuse) {
  const bool is_cuda = backend_of(grad) == Backend::kCuda && backend_of(grad_output) == Backend::kCuda;
  if (is_cuda && grad_output.numel() == 1 && grad_output.device() == grad.device() && dtype_of(grad_output)) {
    return scale_gradient_cuda(grad, grad_output, dtype, may_reuse);
  }
  at::Tensor factor = grad_output;
  if (grad_output.dim() > 0 || grad.dim() == 1) factor = grad_output.unsqueeze(grad.dim() == 1 ? 0 : 1);
  if (const auto value = number_in(grad_output); value == 1.0) {
    if (grad.scalar_type() != dtype) return grad.to(dtype);
    return may_reuse ? grad : grad.clone();  // what is kept for another backward is not given away
  }
  if (may_reuse && grad.scalar_type() == dtype) return grad.mul_(factor);
  return (grad.scalar_type() == dtype ? at::mul(grad, factor) : at::mul(grad, factor.to(grad.scalar_type()))).to(dtype);
}

at::Tensor backward_kernel(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  return scale_gradient(grad, grad_output, input.scalar_type(), /*may_reuse=*/false);
}

// --- Autograd ------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool wants_grad) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastopt::cross_entropy_forward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    int64_t, c10::SymInt, double, bool)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing, wants_grad);
}

at::Tensor call_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastopt::cross_entropy", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                               c10::SymInt, double)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
}

at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastopt::cross_entropy_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(grad_output, grad, input);
}

// The gradient was computed with the loss. The logits are kept for a second derivative only, and are looked at only
// then: as with torch, they may be overwritten between forward and a plain backward. In place, the gradient is computed
// in the backward, over the logits, whose version tells of it: whoever saved them for a backward of his own raises.
struct CrossEntropyBackward final : torch::autograd::Node {
  SavedVariable grad, input, target, weight;
  int64_t reduction = 0;
  c10::SymInt ignore_index = 0;
  double label_smoothing = 0;
  at::ScalarType dtype = at::kFloat;
  bool is_plain = true;           // the forward ran on an ordinary tensor, not on a traced one
  bool is_in_place = false;       // the gradient goes over the logits
  bool is_last_backward = false;  // nothing saved is needed after the coming apply

  std::string name() const override { return "CrossEntropyBackward"; }
  void will_release_variables() override { is_last_backward = true; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&grad, &input, &target, &weight}) variable->reset_data();
    is_released_ = true;
  }

  variable_list apply(variable_list&& grad_outputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
    const at::Tensor& grad_output = grad_outputs[0];
    if (!grad_output.defined()) return {at::Tensor()};
    if (at::GradMode::is_enabled()) return {differentiable_backward(grad_output)};

    if (is_in_place) return {backward_in_place(grad_output)};

    // Unpacked before the guard: a checkpoint recomputes the forward here, and records it.
    const at::Tensor saved = grad.unpack();
    const bool is_traced = !is_plain || backend_of(grad_output) == Backend::kNone || !is_quiet();
    // Asked for their dtype; they may have been overwritten.
    const at::Tensor logits = is_traced && saved.scalar_type() != dtype ? input.unpack() : saved;
    at::AutoDispatchBelowADInplaceOrView guard;
    if (is_traced) return {call_backward(grad_output, saved, logits)};
    return {scale_gradient(saved, grad_output, dtype, is_last_backward)};
  }

 private:
  at::Tensor backward_in_place(const at::Tensor& grad_output) {
    const at::Tensor logits = input.unpack(), indices = target.unpack(), weights = weight.unpack();
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto number = backend_of(logits) == Backend::kCpu ? number_in(grad_output) : std::nullopt;
    auto grad = std::get<1>(cross_entropy_kernel({logits, indices, weights.defined() ? &weights : nullptr, reduction,
                                                  ignore_index.expect_int(), label_smoothing},
                                                 GradientMemory::kLogits, number.value_or(1)));
    if (!number) grad = scale_gradient(grad, grad_output, grad.scalar_type(), /*may_reuse=*/true);
    if (grad.data_ptr() != logits.data_ptr()) grad = logits.alias().copy_(grad);
    torch::autograd::increment_version(logits);
    return grad;
  }

  // Of torch's own composite, so that any further derivative exists.
  at::Tensor differentiable_backward(const at::Tensor& grad_output) {
    at::Tensor logits = input.unpack();
    const at::Tensor weights = weight.unpack();
    const at::Tensor loss =
        torch_cross_entropy(logits, target.unpack(), weights.defined() ? OptionalTensor(weights) : std::nullopt,
                            reduction, ignore_index, label_smoothing);
    return torch::autograd::grad({loss}, {logits}, {grad_output}, /*retain_graph=*/true, /*create_graph=*/true)[0];
  }

  bool is_released_ = false;
};

// Nodes are held by std::shared_ptr or by intrusive_ptr, by torch's version.
template <class Pointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<CrossEntropyBackward>(new CrossEntropyBackward(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<CrossEntropyBackward>();
  }
}

// Whether torch's composite must serve: functorch's transforms and forward-mode derivatives look inside an operator.
bool needs_composite(const at::Tensor& input) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         input._fw_grad(/*level=*/0).defined();
}

// In-place work on memory that autograd or others do not expect to change raises what torch raises of it.
void check_may_overwrite(const at::Tensor& input) {
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  at::assert_no_internal_overlap(input);
}

at::Tensor differentiable(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                          int64_t reduction, c10::SymInt ignore_index, double label_smoothing, bool is_in_place) {
  const bool is_plain = backend_of(input) != Backend::kNone && is_quiet();
  const auto number = ignore_index.maybe_as_int();
  const CrossEntropyArguments arguments{input,          target, pointer_to(weight), reduction, number.value_or(-100),
                                        label_smoothing};
  // A traced tensor has no memory to look at; the kernel looks again when its program runs.
  if (needs_composite(input) || !(is_plain ? kernel_takes(arguments) : fits_kernel(arguments))) {
    return torch_cross_entropy(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
  }
  const bool wants_grad = at::GradMode::is_enabled() && input.requires_grad();
  is_in_place &= wants_grad && is_plain;
  if (is_in_place) check_may_overwrite(input);
  at::Tensor loss, grad;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (is_plain && number) {
      std::tie(loss, grad) = cross_entropy_kernel(arguments, memory_for(wants_grad && !is_in_place));
    } else {
      std::tie(loss, grad) = call_forward(input, target, weight, reduction, ignore_index, label_smoothing, wants_grad);
    }
  }
  if (!wants_grad) return loss;
  auto node = make_node<decltype(torch::autograd::Edge::function)>();
  node->set_next_edges(torch::autograd::collect_next_edges(input));
  node->grad = SavedVariable(grad, /*is_output=*/false);
  node->input = SavedVariable(input, false);
  node->target = SavedVariable(target, false);
  if (arguments.weight) node->weight = SavedVariable(*arguments.weight, false);
  node->reduction = reduction;
  node->ignore_index = std::move(ignore_index);
  node->label_smoothing = label_smoothing;
  node->dtype = input.scalar_type();
  node->is_plain = is_plain;
  node->is_in_place = is_in_place;
  torch::autograd::set_history(loss, node);
  return loss;
}

at::Tensor cross_entropy_autograd(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                  int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  return differentiable(input, target, weight, reduction, std::move(ignore_index), label_smoothing, false);
}

at::Tensor cross_entropy_plain(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  const CrossEntropyArguments arguments{
      input, target, pointer_to(weight), reduction, ignore_index.expect_int(), label_smoothing};
  if (!kernel_takes(arguments)) {
    return torch_cross_entropy(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
  }
  return std::get<0>(cross_entropy_kernel(arguments, GradientMemory::kNone));
}

// The eager door: ordinary tensors skip the dispatcher; whatever else is about goes through it, a profiler too.
at::Tensor cross_entropy_eager(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, int64_t ignore_index, double label_smoothing, bool inplace_backward) {
  const bool is_profiled = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
  if (backend_of(input) != Backend::kNone && is_quiet() && (inplace_backward || !is_profiled) &&
      !at::autocast::is_autocast_enabled(is_plain_cpu(input) ? at::kCPU : at::kCUDA)) {
    return differentiable(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward);
  }
  return call_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing);
}

// Under autocast losses compute in float32, as torch's does.
template <c10::DeviceType kDevice, c10::DispatchKey kAutocast>
at::Tensor cross_entropy_autocast(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                  int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const auto widened = [](const at::Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, kDevice); };
  const OptionalTensor wide_weight = pointer_to(weight) ? OptionalTensor(widened(*weight)) : std::nullopt;
  return call_cross_entropy(widened(input), widened(target), wide_weight, reduction, std::move(ignore_index),
                            label_smoothing);
}

TORCH_LIBRARY_IMPL(fastopt, AutocastCPU, library) {
  library.impl("cross_entropy", cross_entropy_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(fastopt, AutocastCUDA, library) {
  library.impl("cross_entropy", cross_entropy_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}
TORCH_LIBRARY_IMPL(fastopt, CPU, library) { implement_cross_entropy(library); }
TORCH_LIBRARY_IMPL(fastopt, Autograd, library) { library.impl("cross_entropy", cross_entropy_autograd); }
TORCH_LIBRARY_IMPL(fastopt, FuncTorchBatched, library) { library.impl("cross_entropy", torch_cross_entropy); }

}  // namespace

void implement_cross_entropy(torch::Library& library) {
  library.impl("cross_entropy", cross_entropy_plain);
  library.impl("cross_entropy_forward", forward_kernel);
  library.impl("cross_entropy_backward", backward_kernel);
}

void bind_cross_entropy(pybind11::module_& module) { module.def("cross_entropy", &cross_entropy_eager); }

}  // namespace fastopt
