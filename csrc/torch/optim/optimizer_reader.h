// Reads a Python optimizer itself: its groups, its states, and the numbers that a GradScaler has left on it.
#pragma once

#include <optional>

#include "torch/optim/group_reader.h"
#include "torch/optim/ordinary.h"

namespace fastopt {

class OptimizerReader {
 public:
  // `is_ordinary_class`: a Python function that says of a class whether it leaves to torch's class what a step calls.
  explicit OptimizerReader(py::object is_ordinary_class) : ask_class_(std::move(is_ordinary_class)) {}

  // True if the optimizer is stepped as torch's class is: its own class overrides nothing that a step calls, groups are
  // a list and states a dict. Else why_not() holds the reason.
  bool read(PyObject* optimizer, bool reads_scaling) {
    if (!is_ordinary_class(Py_TYPE(optimizer))) return refuse("the optimizer's class overrides _init_group");
    const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(optimizer, nullptr));
    if (!attributes) throw py::error_already_set();
    const auto find = [&](const char* name) { return PyDict_GetItem(attributes.ptr(), interned(name)); };
    if (find("_init_group")) return refuse("the optimizer overrides _init_group");
    PyObject* const groups = find("param_groups");
    PyObject* const state = find("state");
    if (!groups || !PyList_CheckExact(groups)) return refuse("the param groups are not a list");
    if (!state || !is_ordinary_dict(state)) return refuse("the state is not a dict");
    groups_ = py::reinterpret_borrow<py::object>(groups);
    state_ = py::reinterpret_borrow<py::object>(state);
    grad_scale_ = found_inf_ = std::nullopt;
    if (!reads_scaling) return true;
    return read_tensor(find("grad_scale"), grad_scale_) && read_tensor(find("found_inf"), found_inf_);
  }
  // Lets go of what was read.
  void clear() {
    groups_ = state_ = py::object();
    grad_scale_ = found_inf_ = std::nullopt;
  }

  PyObject* groups() const { return groups_.ptr(); }
  PyObject* state() const { return state_.ptr(); }
  const at::Tensor* grad_scale() const { return grad_scale_ ? &*grad_scale_ : nullptr; }
  const at::Tensor* found_inf() const { return found_inf_ ? &*found_inf_ : nullptr; }
  const char* why_not() const { return why_not_; }

 private:
  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  bool read_tensor(PyObject* value, std::optional<at::Tensor>& to) {
    if (!value || value == Py_None) return true;
    if (!THPVariable_CheckExact(value)) return refuse("a GradScaler's number is not a tensor");
    to = THPVariable_Unpack(value);
    return true;
  }

  // One look a class, and another when it has changed.
  bool is_ordinary_class(PyTypeObject* type) {
    const uint64_t version = version_of(type);
    if (type != checked_type_ || version != checked_version_ || version == 0) {
      is_ordinary_class_ = py::cast<bool>(ask_class_(py::handle(reinterpret_cast<PyObject*>(type))));
      checked_type_ = type;
      checked_version_ = version_of(type);  // asking may have given the class a number
    }
    return is_ordinary_class_;
  }

  const py::object ask_class_;
  PyTypeObject* checked_type_ = nullptr;
  uint64_t checked_version_ = 0;
  bool is_ordinary_class_ = false;
  py::object groups_, state_;
  std::optional<at::Tensor> grad_scale_, found_inf_;
  const char* why_not_ = "";
};

}  // namespace fastopt
