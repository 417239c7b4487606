#include "torch/bindings.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "torch/context.h"
#include "torch/losses/cross_entropy_calls.h"
#include "torch/losses/cross_entropy_kernel.h"
#include "torch/losses/cross_entropy_node.h"
#include "torch/losses/kept_gradient.h"
#include "torch/losses/loss_factor.h"
#include "torch/losses/python_loss.h"
#include "torch/losses/scale_gradient.h"
#include "torch/operators.h"

namespace fastopt {
namespace {

// --- The operators' kernels ----------------------------------------------------------------------------------------

void check_reduction(int64_t reduction) {
  TORCH_CHECK_VALUE(at::Reduction::None <= reduction && reduction <= at::Reduction::Sum,
                    "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

GradientMemory memory_for(bool wants_grad) { return wants_grad ? GradientMemory::kFresh : GradientMemory::kNone; }

// An operator whose arguments are those of fastopt::cross_entropy, as a function of one struct.
template <auto kFunction>
auto from_schema(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 c10::SymInt ignore_index, double label_smoothing, bool in_float32) {
  const CrossEntropyOptions options{reduction, std::move(ignore_index), label_smoothing, in_float32};
  return kFunction({input, target, pointer_to(weight), options});
}

at::Tensor loss_kernel(const CrossEntropyArguments& arguments) {
  check_reduction(arguments.options.reduction);
  if (!kernel_takes(arguments)) return torch_cross_entropy(arguments);
  return cross_entropy_kernel(arguments, GradientMemory::kNone).first;
}

std::tuple<at::Tensor, at::Tensor> forward_kernel(const at::Tensor& input, const at::Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                  double label_smoothing, bool wants_grad, bool in_float32) {
  check_reduction(reduction);
  const CrossEntropyOptions options{reduction, ignore_index, label_smoothing, in_float32};
  auto [loss, gradient] = cross_entropy_kernel({input, target, pointer_to(weight), options}, memory_for(wants_grad));
  if (!gradient.grad.defined()) gradient.grad = at::empty({0}, input.options().requires_grad(false));
  return {loss, gradient.grad};
}

at::Tensor backward_kernel(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input) {
  return scale_gradient(grad, along_classes(grad_output, grad), input.scalar_type(), /*may_reuse=*/false);
}

// In a compiled program on the CPU: returns the loss, and a keeper that owns its gradient.
std::tuple<at::Tensor, at::Tensor> keep_kernel(const CrossEntropyArguments& arguments) {
  check_reduction(arguments.options.reduction);
  auto [loss, gradient] = cross_entropy_kernel(arguments, GradientMemory::kFresh, predicted_factor(arguments));
  return {loss, keep_gradient(std::move(gradient))};
}

at::Tensor take_kernel(const at::Tensor& grad_output, const at::Tensor& keeper, const at::Tensor& input,
                       const at::Tensor& target, const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, bool in_float32) {
  const CrossEntropyOptions options{reduction, ignore_index, label_smoothing, in_float32};
  return compiled_backward({input, target, pointer_to(weight), options}, grad_output, take_gradient(keeper));
}

// --- Autograd ------------------------------------------------------------------------------------------------------

// True if torch's composite must be used: functorch transforms and forward-mode derivatives do not support our
// operators.
bool needs_composite(const CrossEntropyArguments& a) {
  const auto has_tangent = [](const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); };
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         (is_forward_mode_on() &&
          (has_tangent(a.input) || has_tangent(a.target) || (a.weight && has_tangent(*a.weight))));
}

// True if the gradient may overwrite the logits. Raises torch's error if autograd forbids in-place operations on them.
// False if elements of the logits may share memory with each other or with another argument, since some would be read
// after they are overwritten.
bool may_overwrite(const CrossEntropyArguments& a) {
  torch::autograd::check_inplace(a.input, /*requires_grad=*/true);
  at::assert_no_internal_overlap(a.input);
  const auto is_apart = [&](const at::Tensor& other) { return !may_share_memory(a.input, other); };
  return !may_overlap_itself(a.input) && is_apart(a.target) && (!a.weight || is_apart(*a.weight));
}

at::Tensor differentiable(const CrossEntropyArguments& arguments, bool is_in_place) {
  const at::Tensor& input = arguments.input;
  check_reduction(arguments.options.reduction);
  const bool is_plain = backend_of(input) != Backend::kNone && !has_dispatch_modes();
  // A traced tensor has no memory to check; the kernel checks it when its program runs.
  if (needs_composite(arguments) || !(is_plain ? kernel_takes(arguments) : fits_kernel(arguments))) {
    return torch_cross_entropy(arguments);
  }
  const bool wants_grad = at::GradMode::is_enabled() && input.requires_grad();
  is_in_place = is_in_place && wants_grad && is_plain && may_overwrite(arguments);
  at::Tensor loss;
  SavedForBackward saved;
  saved.is_plain = is_plain;
  saved.is_in_place = is_in_place;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (is_plain && arguments.options.ignore_index.maybe_as_int()) {
      const auto memory = memory_for(wants_grad && !is_in_place);
      const auto factor = memory != GradientMemory::kNone ? predicted_factor(arguments) : LossFactor{};
      std::tie(loss, saved.gradient) =
          cross_entropy_kernel(arguments, memory, factor, is_in_place ? &saved.totals : nullptr);
    } else if (wants_grad && is_for_cpu_kernels(input)) {
      std::tie(loss, saved.keeper) = call_keep(arguments);
    } else {
      std::tie(loss, saved.gradient.grad) = call_forward(arguments, wants_grad);
    }
  }
  if (!wants_grad) return loss;
  record_cross_entropy(loss, arguments, std::move(saved));
  return loss;
}

at::Tensor differentiable_loss(const CrossEntropyArguments& arguments) {
  return differentiable(arguments, /*is_in_place=*/false);
}

// Under autocast the loss computes in float32, as torch's does. Calls f with converted arguments, or with the given
// ones if the kernel computes in float32 from 16-bit logits.
template <class F>
at::Tensor with_autocast(at::DeviceType device, const CrossEntropyArguments& given, F&& f) {
  const c10::impl::ExcludeDispatchKeyGuard guard(device == at::kCPU ? c10::DispatchKey::AutocastCPU
                                                                    : c10::DispatchKey::AutocastCUDA);
  CrossEntropyOptions in_float32 = given.options;
  in_float32.in_float32 = true;
  const CrossEntropyArguments arguments{given.input, given.target, given.weight, in_float32};
  if (fits_kernel(arguments)) return f(arguments);
  const auto widened = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, device); };
  const at::Tensor input = widened(given.input), target = widened(given.target);
  const at::Tensor weight = given.weight ? widened(*given.weight) : at::Tensor();
  return f(CrossEntropyArguments{input, target, given.weight ? &weight : nullptr, given.options});
}

template <c10::DeviceType kDevice>
at::Tensor autocast_loss(const CrossEntropyArguments& arguments) {
  return with_autocast(kDevice, arguments, call_cross_entropy);
}

// The eager fast path: ordinary tensors skip the dispatcher. Everything else is dispatched, and all while profiled.
at::Tensor eager_loss(const CrossEntropyArguments& arguments, bool inplace_backward) {
  const at::Tensor& input = arguments.input;
  const bool is_profiled = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
  if (backend_of(input) == Backend::kNone || has_dispatch_modes() || (is_profiled && !inplace_backward)) {
    return call_cross_entropy(arguments);
  }
  const auto run = [&](const CrossEntropyArguments& a) { return differentiable(a, inplace_backward); };
  const at::DeviceType device = is_plain_cpu(input) ? at::kCPU : at::kCUDA;
  return at::autocast::is_autocast_enabled(device) ? with_autocast(device, arguments, run) : run(arguments);
}

// --- Python --------------------------------------------------------------------------------------------------------

// cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward). Returns
// NotImplemented for an argument of another type than torch.Tensor or Parameter, int and float, which torch judges.
PyObject* cross_entropy_from_python(PyObject* /*self*/, PyObject* const* args, Py_ssize_t n_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n_args == 7, "cross_entropy takes 7 arguments, got ", n_args);
  const bool has_weight = args[2] != Py_None;
  if (!THPVariable_CheckExact(args[0]) || !THPVariable_CheckExact(args[1]) ||
      (has_weight && !THPVariable_CheckExact(args[2])) || !PyLong_CheckExact(args[3]) || !PyLong_CheckExact(args[4]) ||
      !(PyFloat_CheckExact(args[5]) || PyLong_CheckExact(args[5]))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  int overflows = 0;
  const int64_t ignore_index = PyLong_AsLongLongAndOverflow(args[4], &overflows);
  const double label_smoothing = PyFloat_AsDouble(args[5]);
  if (overflows != 0 || PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  const CrossEntropyOptions options{PyLong_AsLong(args[3]), ignore_index, label_smoothing};
  const int is_in_place = PyObject_IsTrue(args[6]);
  if (is_in_place < 0) throw python_error();
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  const at::Tensor& target = THPVariable_Unpack(args[1]);
  const at::Tensor* const weight = has_weight ? &THPVariable_Unpack(args[2]) : nullptr;
  const auto run = [&] {
    const int64_t n_before = losses_of_thread;
    at::Tensor loss = eager_loss({input, target, weight, options}, is_in_place > 0);
    if (losses_of_thread == n_before) ++kernel_calls().torch_cross_entropy;
    return loss;
  };
  return loss_object(input, run);
  END_HANDLE_TH_ERRORS
}

PyMethodDef python_functions[] = {
    {"cross_entropy", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cross_entropy_from_python)),
     METH_FASTCALL, nullptr},
    {}};

TORCH_LIBRARY_IMPL(fastopt, AutocastCPU, library) {
  library.impl("cross_entropy", from_schema<autocast_loss<c10::DeviceType::CPU>>);
}
TORCH_LIBRARY_IMPL(fastopt, AutocastCUDA, library) {
  library.impl("cross_entropy", from_schema<autocast_loss<c10::DeviceType::CUDA>>);
}
TORCH_LIBRARY_IMPL(fastopt, CPU, library) {
  implement_cross_entropy(library);
  library.impl("cross_entropy_keep", from_schema<keep_kernel>);
  library.impl("cross_entropy_take", take_kernel);
}
TORCH_LIBRARY_IMPL(fastopt, Autograd, library) { library.impl("cross_entropy", from_schema<differentiable_loss>); }
TORCH_LIBRARY_IMPL(fastopt, FuncTorchBatched, library) {
  library.impl("cross_entropy", from_schema<torch_cross_entropy>);
}

}  // namespace

void implement_cross_entropy(torch::Library& library) {
  library.impl("cross_entropy", from_schema<loss_kernel>);
  library.impl("cross_entropy_forward", forward_kernel);
  library.impl("cross_entropy_backward", backward_kernel);
}

void bind_cross_entropy(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), python_functions) != 0) throw pybind11::error_already_set();
}

}  // namespace fastopt
