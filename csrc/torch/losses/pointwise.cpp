// Pointwise losses for Python: a function for each of the list.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "losses/pointwise_losses.h"
#include "torch/bindings.h"
#include "torch/context.h"
#include "torch/losses/loss_factor.h"
#include "torch/losses/pointwise_call.h"
#include "torch/losses/python_loss.h"

namespace fastopt {
namespace {

// True if something must see torch's operators, tracing among it, or converts their arguments.
bool is_observed() {
  return has_dispatch_modes() || is_forward_mode_on() || at::autocast::is_autocast_enabled(at::kCPU);
}

at::Tensor pointwise_loss(const PointwiseOptions& options, const PointwiseInputs& inputs) {
  RECORD_FUNCTION(options.loss->profiled_name, std::vector<c10::IValue>());
  unsigned wanted = 0;
  for (int i = 0; at::GradMode::is_enabled() && i < options.loss->n_derivatives; ++i) {
    wanted |= static_cast<unsigned>(inputs[i].requires_grad()) << i;
  }
  // Gradients of each element's loss come with a factor for each. float16 cannot hold a gradient that a loss scaler has
  // not multiplied yet. Hooks for saved tensors get the inputs, as those of torch's node.
  const bool is_later = options.reduction == at::Reduction::None || inputs[0].scalar_type() == at::kHalf;
  const bool computes_gradients =
      wanted != 0 && (!is_later || options.loss->saves_derivatives) && !has_saved_tensor_hooks();
  const double grad_scale = is_later ? 1 : gradient_scale(options, inputs[0].numel());
  PointwiseGradients gradients;
  at::Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    loss = pointwise_forward(options, inputs, computes_gradients ? wanted : 0, grad_scale, gradients);
  }
  if (wanted != 0) record_pointwise(loss, options, inputs, gradients, is_later);
  return loss;
}

int64_t reduction_of(PyObject* name) {
  if (!PyUnicode_CheckExact(name)) return -1;
  if (PyUnicode_CompareWithASCIIString(name, "mean") == 0) return at::Reduction::Mean;
  if (PyUnicode_CompareWithASCIIString(name, "sum") == 0) return at::Reduction::Sum;
  return PyUnicode_CompareWithASCIIString(name, "none") == 0 ? at::Reduction::None : -1;
}

// The tensors, the name of the reduction, and the options by their order in the loss's header. Returns NotImplemented
// for what torch's own function must judge or compute.
template <int kLoss>
PyObject* loss_from_python(PyObject* /*self*/, PyObject* const* args, Py_ssize_t n_args) {
  HANDLE_TH_ERRORS
  const PointwiseDescription& loss = pointwise_losses()[kLoss];
  const Py_ssize_t n_inputs = loss.n_inputs, n_numbers = static_cast<Py_ssize_t>(loss.numbers.size());
  TORCH_CHECK_TYPE(n_args == n_inputs + 1 + n_numbers, loss.name, " takes ", n_inputs + 1 + n_numbers,
                   " arguments, got ", n_args);
  PointwiseInputs inputs;
  for (Py_ssize_t i = 0; i < n_inputs; ++i) {
    if (!THPVariable_CheckExact(args[i])) Py_RETURN_NOTIMPLEMENTED;
    inputs.push_back(THPVariable_Unpack(args[i]));
  }
  PointwiseOptions options{&loss, reduction_of(args[n_inputs])};
  for (Py_ssize_t i = 0; i < n_numbers; ++i) {
    PyObject* const number = args[n_inputs + 1 + i];
    if (!PyFloat_CheckExact(number) && !PyLong_CheckExact(number) && !PyBool_Check(number)) Py_RETURN_NOTIMPLEMENTED;
    options.numbers[i] = PyFloat_AsDouble(number);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      Py_RETURN_NOTIMPLEMENTED;
    }
  }
  if (options.reduction < 0 || is_observed() || !pointwise_kernel_takes(loss, inputs)) Py_RETURN_NOTIMPLEMENTED;
  return loss_object(inputs[0], [&] { return pointwise_loss(options, inputs); });
  END_HANDLE_TH_ERRORS
}

template <int... kLosses>
PyMethodDef* python_functions(std::integer_sequence<int, kLosses...>) {
  static PyMethodDef functions[] = {
      {PointwiseLossAt<kLosses>::kName,
       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(loss_from_python<kLosses>)), METH_FASTCALL,
       nullptr}...,
      {}};
  return functions;
}

}  // namespace

void bind_pointwise_losses(pybind11::module_& module) {
  PyMethodDef* const functions = python_functions(std::make_integer_sequence<int, kPointwiseLosses>{});
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw pybind11::error_already_set();
}

void add_pointwise_calls(pybind11::dict& calls) {
  for (const PointwiseDescription& loss : pointwise_losses()) {
    calls[loss.name.c_str()] = pointwise_calls(loss.place).load();
  }
}

}  // namespace fastopt
