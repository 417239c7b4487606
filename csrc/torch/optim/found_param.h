// Reads a parameter, its gradient and its states from Python's objects. Changes nothing; references are borrowed.
#pragma once

#include "torch/optim/ordinary.h"
#include "torch/optim/state_reader.h"
#include "torch/optim/step_groups.h"
#include "torch/optim/update_batch.h"

namespace fastopt {

struct FoundParam {
  PyObject* own_state = nullptr;  // the dict of its states, or null
  ParamTensors tensors{};         // without a gradient, none; those that this step makes are null
  bool lacks_some = false;        // of what the state keeps
};

// True for a tensor of which Python overrides nothing. kOnAnyThread: on a thread without the interpreter lock, while
// the one that has it waits; then of torch's own classes only.
template <bool kOnAnyThread>
bool is_plain_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) return true;
  return !kOnAnyThread && THPVariable_Check(object) && is_ordinary_tensor(object);
}

// Finds a parameter's tensors; returns why kernels cannot take it, or null. `last_seen`: where its state may be among
// the items. `found`: a new one, for only what the parameter has is written.
template <bool kOnAnyThread>
[[gnu::always_inline]] inline const char* find_param(PyObject* object, const StepGroup& group, const StateItems& items,
                                                     size_t& last_seen, FoundParam& found) {
  if (!is_plain_tensor<kOnAnyThread>(object)) {
    const bool is_tensor = !kOnAnyThread && THPVariable_Check(object);
    return is_tensor ? "a parameter's class overrides what a step does" : "a parameter is not a tensor";
  }
  const at::Tensor& param = THPVariable_Unpack(object);
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  if (!grad.defined()) return nullptr;
  PyObject* const grad_object = grad.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  if (grad_object && !is_plain_tensor<kOnAnyThread>(grad_object)) {
    return "a gradient's class overrides what a step does";
  }

  found.tensors.param = &param;
  found.tensors.grad = &grad;
  if (group.n_kept() == 0) return nullptr;
  found.tensors.n_states = group.n_states;
  found.tensors.n_scalars = group.n_scalars;
  found.own_state = items.find(object, last_seen);
  if (found.own_state && !is_ordinary_dict(found.own_state)) return "a parameter's state is not a dict";
  const bool is_new = !found.own_state || PyDict_GET_SIZE(found.own_state) == 0;
  for (int k = 0; k < group.n_kept(); ++k) {
    PyObject* const value = find_item(found.own_state, group.kept_keys[k]);
    if (value && is_plain_tensor<kOnAnyThread>(value)) {
      found.tensors.kept[k] = &THPVariable_Unpack(value);
      continue;
    }
    // torch makes a state where the parameter's whole state is empty; a momentum buffer also where there is None.
    const bool is_made = is_new ? group.makes_states : group.has_first_step_flag && (!value || value == Py_None);
    if (!is_made) return "state is not there yet";
    found.lacks_some = true;
  }
  return nullptr;
}

// Why a tensor, wherever it is, is none of a state's scalars, or null.
inline const char* fault_of_scalar(const at::Tensor& scalar) {
  const bool is_real = scalar.scalar_type() == at::kDouble || scalar.scalar_type() == at::kFloat;
  if (scalar.numel() != 1 || !is_real) return "a scalar of a state is not a number";
  return scalar.is_inference() ? "a scalar of a state was made in inference mode" : nullptr;
}

// Reads the k-th scalar. Returns why it cannot be read on the CPU, or null. Raises RuntimeError if its memory has been
// freed.
inline const char* read_cpu_scalar(const at::Tensor& scalar, int k, ScalarValues& values) {
  if (const char* fault = fault_of_scalar(scalar)) return fault;
  if (!is_plain_cpu(scalar)) return "a scalar of a state is not in CPU memory";
  check_backed(scalar, "a scalar of a state");
  const bool is_double = scalar.scalar_type() == at::kDouble;
  values.numbers[k] = read_scalar(scalar.const_data_ptr(), is_double);
  values.are_float &= !is_double;
  return values.numbers[k] >= 0 ? nullptr : "a scalar of a state is negative";
}

// Reads the scalars of a parameter's state, or leaves them to the kernel if they are on its device. is_scaled: a
// GradScaler has left its numbers to the kernel. Returns why they are not as they should be, or null.
inline const char* read_scalars(const StepGroup& group, bool is_cuda, bool is_scaled, ParamTensors& tensors,
                                StepInput& input) {
  const at::Tensor& param = *tensors.param;
  for (int k = 0; k < tensors.n_scalars; ++k) {
    const at::Tensor& scalar = *tensors.kept[tensors.n_states + k];
    // A default device places steps too, whatever the options.
    const bool is_on_device =
        is_cuda && (group.wants_device_scalars() || !is_plain_cpu(scalar)) && backend_of(scalar) == Backend::kCuda;
    if (k > 0 && is_on_device != input.has_scalars_on_device) return "the scalars of a state are on different devices";
    input.has_scalars_on_device = is_on_device;
    if (is_on_device) {
      if (const char* fault = fault_of_scalar(scalar)) return fault;
      if (scalar.device() != param.device()) return "a scalar of a state is on another device";
    } else {
      if (group.is_capturable || is_scaled) return "a scalar of a state is not on its parameter's device";
      if (const char* fault = read_cpu_scalar(scalar, k, input.scalars)) return fault;
    }
  }
  tensors.has_scalars_on_device = input.has_scalars_on_device;
  return nullptr;
}

}  // namespace fastopt
