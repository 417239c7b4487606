// States that a step makes, and where they go once it has been done.
#pragma once

#include <utility>  // move
#include <vector>

#include "torch/found_param.h"
#include "torch/large_arrays.h"

namespace fastopt {

// Of optimizers whose parameters have a single state.
class NewStates {
 public:
  // Makes the states that a parameter lacks; whether it lacked any. The tensors live until the next call.
  bool make(PyObject* param, FoundParam& found) {
    bool is_any = false;
    for (int s = 0; s < found.tensors.n_states; ++s) {
      if (found.tensors.states[s]) continue;
      if (!found.own_state) without_dict_.push_back(py::reinterpret_borrow<py::object>(param));
      made_.push_back({empty_state(*found.tensors.param), py::reinterpret_borrow<py::object>(found.own_state)});
      found.tensors.states[s] = &made_.back().tensor;
      is_any = true;
    }
    return is_any;
  }
  void clear() {
    made_.clear();
    without_dict_.clear();
  }

  // True if a parameter that is to have a state has no dict for it.
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

  // No Python code runs: nothing can come between the update and its state.
  void keep(const char* name) {
    for (Made& made : made_) {
      const auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(made.tensor)));
      if (!tensor || PyDict_SetItem(made.own_state.ptr(), interned(name), tensor.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  }

 private:
  // A state, and the dict that takes it: null until the parameter has one.
  struct Made {
    at::Tensor tensor;
    py::object own_state;
  };

  // True if looking up a parameter that has no state makes an empty one: in a plain dict it is an error.
  static bool makes_dicts(PyObject* state) {
    const auto factory = py::reinterpret_steal<py::object>(PyObject_GetAttrString(state, "default_factory"));
    PyErr_Clear();
    return factory.ptr() == reinterpret_cast<PyObject*>(&PyDict_Type);
  }

  std::vector<Made> made_;
  std::vector<py::object> without_dict_;  // parameters
};

}  // namespace fastopt
