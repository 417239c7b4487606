// Reads a parameter, its gradient and its states from Python's objects. Changes nothing; references are borrowed.
#pragma once

#include <array>
#include <iterator>  // size

#include "torch/families.h"
#include "torch/ordinary.h"
#include "torch/state_reader.h"
#include "torch/update_batch.h"

namespace fastopt {

struct FoundParam {
  PyObject* own_state = nullptr;     // the dict of its states, or null
  const at::Tensor* step = nullptr;  // its count of steps, wherever it is, or null
  ParamTensors tensors{};            // a state is null if this step makes it; without a gradient, none; no step
};

// The keys of a parameter's state. Made with the interpreter lock.
template <class Family>
struct StateKeys {
  PyObject* step = interned("step");
  std::array<PyObject*, std::size(Family::kStates)> states;

  StateKeys() {
    for (size_t s = 0; s < states.size(); ++s) states[s] = interned(Family::kStates[s]);
  }
};

// True for a tensor of which Python overrides nothing. kOnAnyThread: on a thread without the interpreter lock,
// while the one that has it waits; then of torch's own classes only.
template <bool kOnAnyThread>
bool is_plain_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) return true;
  return !kOnAnyThread && THPVariable_Check(object) && is_ordinary_tensor(object);
}

// Finds what a parameter has; returns why kernels cannot take it, or null. `last_seen`: where its state may be in the
// state_items. `found`: a new one, for what a parameter does not have is not written.
template <class Family, bool kOnAnyThread>
[[gnu::always_inline]] inline const char* find_param(PyObject* object, const typename Family::Options& options,
                                                     const StateKeys<Family>& keys, const StateItems& state_items,
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
  if (!Family::kHasStep && n_states_of<Family>(options) == 0) return nullptr;
  found.own_state = state_items.find(object, last_seen);
  if (found.own_state && !is_ordinary_dict(found.own_state)) return "a parameter's state is not a dict";
  const auto find_tensor = [&](PyObject* key) -> const at::Tensor* {
    PyObject* const value = find_item(found.own_state, key);
    return value && is_plain_tensor<kOnAnyThread>(value) ? &THPVariable_Unpack(value) : nullptr;
  };
  if constexpr (Family::kHasStep) {
    found.step = find_tensor(keys.step);
    if (!found.step) return "state is not there yet";
  }
  for (size_t s = 0; s < keys.states.size(); ++s) {
    if (!Family::uses_state(options, s)) continue;
    const at::Tensor* const tensor = find_tensor(keys.states[s]);
    if (!tensor) {
      PyObject* const other = find_item(found.own_state, keys.states[s]);
      if (!Family::kMakesStates || (other && other != Py_None)) return "state is not there yet";
    }
    found.tensors.states[found.tensors.n_states++] = tensor;
  }
  return nullptr;
}

// Why a tensor, wherever it is, is no count of steps, or null.
inline const char* fault_of_step(const at::Tensor& step) {
  const bool is_real = step.scalar_type() == at::kDouble || step.scalar_type() == at::kFloat;
  if (step.numel() != 1 || !is_real) return "a step is not a number";
  return step.is_inference() ? "a step was made in inference mode" : nullptr;
}

// Reads the count of steps, the one to come included. Returns why it cannot be counted on the CPU, or null. Raises
// RuntimeError if its memory has been freed.
inline const char* read_step(const at::Tensor& step, double& count) {
  if (const char* fault = fault_of_step(step)) return fault;
  if (!is_plain_cpu(step)) return "a step is not in CPU memory";
  check_backed(step, "a step");
  const void* const number = step.const_data_ptr();
  if (step.scalar_type() == at::kDouble) {
    count = *static_cast<const double*>(number) + 1;
  } else {
    count = static_cast<double>(*static_cast<const float*>(number) + 1);
  }
  return count >= 1 ? nullptr : "a step is negative";
}

}  // namespace fastopt
