#include "torch/cross_entropy.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "torch/context.h"
#include "torch/cross_entropy_kernel.h"
#include "torch/cross_entropy_node.h"
#include "torch/operators.h"

namespace fastopt {
namespace {

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

at::Tensor backward_kernel(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  return scale_gradient(grad, grad_output, input.scalar_type(), /*may_reuse=*/false);
}

// --- Autograd ------------------------------------------------------------------------------------------------------

at::Tensor call_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastopt::cross_entropy", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                               c10::SymInt, double)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
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
  at::Tensor loss, grad, totals;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (is_plain && number) {
      std::tie(loss, grad) = cross_entropy_kernel(arguments, memory_for(wants_grad && !is_in_place), /*factor=*/1,
                                                  is_in_place ? &totals : nullptr);
    } else {
      std::tie(loss, grad) = call_forward(input, target, weight, reduction, ignore_index, label_smoothing, wants_grad);
    }
  }
  if (!wants_grad) return loss;
  record_cross_entropy(loss, grad, arguments, std::move(ignore_index), is_plain, is_in_place, std::move(totals));
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
