// States that a step makes, and the dicts that keep them once it has been done.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/full.h>
#include <c10/core/DefaultDtype.h>

#include <memory>   // unique_ptr
#include <utility>  // move
#include <vector>

#include "torch/large_arrays.h"
#include "torch/optim/found_param.h"

namespace fastopt {

class NewStates {
 public:
  explicit NewStates(const Optimizer& optimizer) : optimizer_(optimizer) {}

  void clear() {
    made_.clear();
    without_dict_.clear();
  }

  // A parameter has no dict for its states, which add_dicts() mends.
  void note_without_dict(PyObject* param) { without_dict_.push_back(py::reinterpret_borrow<py::object>(param)); }
  bool lack_dicts() const { return !without_dict_.empty(); }

  // Gives each of them one in optimizer.state; false if the optimizer must do that. Runs Python code.
  bool add_dicts(PyObject* state) {
    if (!makes_dicts(state)) return false;
    const auto params = std::move(without_dict_);
    for (const py::object& param : params) {
      if (!PyDict_SetDefault(state, param.ptr(), py::dict().ptr())) throw py::error_already_set();
    }
    return true;
  }

  // Makes what a parameter's state lacks, as torch's _init_group does. The tensors live until clear().
  void make(const StepGroup& group, FoundParam& found) {
    const auto dict = py::reinterpret_borrow<py::object>(found.own_state);
    const auto make_one = [&](int k) {
      if (found.tensors.kept[k]) return;
      made_.emplace_back(new Made{made(group, *found.tensors.param, k), group.kept_keys[k], dict});
      found.tensors.kept[k] = &made_.back()->tensor;
    };
    for (int k = group.n_states; k < group.n_kept(); ++k) make_one(k);  // torch's order in the dict
    for (int k = 0; k < group.n_states; ++k) make_one(k);
  }

  // No Python code runs: nothing can come between the update and its state.
  void keep() {
    for (const auto& made : made_) {
      const auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(made->tensor)));
      if (!tensor || PyDict_SetItem(made->own_state.ptr(), made->key, tensor.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  }

 private:
  struct Made {
    at::Tensor tensor;
    PyObject* key;
    py::object own_state;  // the dict that takes it
  };

  at::Tensor made(const StepGroup& group, const at::Tensor& param, int k) const {
    at::AutoDispatchBelowADInplaceOrView guard;                // a fresh tensor has version 0
    if (group.has_first_step_flag) return empty_state(param);  // the rule fills it
    const double value = optimizer_.initial_value(group.options, name_of(group.kept_keys[k]));
    if (k < group.n_states) {
      at::Tensor state = zero_state(param);
      if (value != 0) state.fill_(value);
      return state;
    }
    const bool is_double = !group.is_fused && c10::get_default_dtype_as_scalartype() == at::kDouble;
    const auto device = group.wants_device_scalars() ? param.device() : c10::Device(c10::kCPU);
    return at::full({}, value, at::TensorOptions(device).dtype(is_double ? at::kDouble : at::kFloat));
  }

  static std::string_view name_of(PyObject* key) {
    Py_ssize_t n = 0;
    const char* const name = PyUnicode_AsUTF8AndSize(key, &n);
    return {name, static_cast<size_t>(n)};
  }

  // True if looking up a parameter that has no state makes an empty one: in a plain dict it is an error.
  static bool makes_dicts(PyObject* state) {
    const auto factory = py::reinterpret_steal<py::object>(PyObject_GetAttrString(state, "default_factory"));
    PyErr_Clear();
    return factory.ptr() == reinterpret_cast<PyObject*>(&PyDict_Type);
  }

  const Optimizer& optimizer_;
  std::vector<std::unique_ptr<Made>> made_;  // pointers to the tensors last
  std::vector<py::object> without_dict_;     // parameters
};

}  // namespace fastopt
