// Reads hyper-parameters from a param group (a Python dict). The interpreter lock is held. Numbers and flags of unusual
// types run Python code, which may change anything: the caller holds the group.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <utility>  // pair

#include "torch/context.h"

namespace fastopt {

namespace py = pybind11;

// The interned Python string of a literal, made once, so that a lookup hashes and compares nothing but pointers.
// The table is keyed by the literal's address: a name written in two places only takes two entries.
inline PyObject* interned(const char* name) {
  constexpr size_t kCapacity = 256;
  static std::array<std::pair<const char*, PyObject*>, kCapacity> table{};
  size_t slot = (reinterpret_cast<uintptr_t>(name) * 0x9e3779b97f4a7c15ull >> 32) % kCapacity;
  while (table[slot].first != nullptr && table[slot].first != name) slot = (slot + 1) % kCapacity;
  if (table[slot].first == nullptr) table[slot] = {name, PyUnicode_InternFromString(name)};
  return table[slot].second;
}

class GroupReader {
 public:
  explicit GroupReader(PyObject* group) : group_(group) {}

  bool number(PyObject* key, double& to) { return as_number(find(key), to); }

  // The learning rate; one on a GPU is not read, but left for the kernel in lr_on_device().
  bool lr(double& to) {
    PyObject* value = find(interned("lr"));
    if (value && THPVariable_CheckExact(value)) {
      const at::Tensor& tensor = THPVariable_Unpack(value);
      if (backend_of(tensor) == Backend::kCuda) {
        const bool is_number = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
        if (!is_number || tensor.numel() != 1 || tensor.requires_grad()) return false;
        lr_on_device_ = tensor;
        to = 0;
        return true;
      }
    }
    return as_number(value, to);
  }
  const at::Tensor& lr_on_device() const { return lr_on_device_; }  // undefined if lr is not on a GPU

  // A number of a pair.
  bool number_of_pair(PyObject* key, int place, double& to) {
    PyObject* value = find(key);
    if (value && PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == 2) {
      return as_number(PyTuple_GET_ITEM(value, place), to);
    }
    if (value && PyList_CheckExact(value) && PyList_GET_SIZE(value) == 2) {
      return as_number(PyList_GET_ITEM(value, place), to);
    }
    return false;
  }

  bool flag(PyObject* key, bool& to) {
    PyObject* value = find(key);
    const int is_true = value ? PyObject_IsTrue(value) : -1;
    if (is_true < 0) PyErr_Clear();
    to = is_true > 0;
    return is_true >= 0;
  }

  // Not every optimizer has these flags; an absent one is false.
  bool flag_or_false(const char* name) {
    bool value = false;
    flag(interned(name), value);
    return value;
  }

  PyObject* find(PyObject* key) { return PyDict_GetItem(group_, key); }

 private:
  // Numbers as torch takes them: float, int, another real number, or a tensor of one element in CPU memory.
  static bool as_number(PyObject* value, double& to) {
    if (!value) return false;
    if (PyFloat_Check(value)) {
      to = PyFloat_AS_DOUBLE(value);
      return true;
    }
    if (PyLong_Check(value)) {
      to = PyLong_AsDouble(value);
      return no_error();
    }
    if (THPVariable_Check(value)) {
      if (!THPVariable_CheckExact(value)) return false;
      const at::Tensor& tensor = THPVariable_Unpack(value);
      const auto number = number_in(tensor);
      if (!number || tensor.requires_grad()) return false;
      to = *number;
      return true;
    }
    if (PyObject_IsInstance(value, real_number()) == 1) {
      to = PyFloat_AsDouble(value);
      return no_error();
    }
    return no_error() && false;
  }

  // True if Python raised nothing; what it raised is dropped: the slow path raises it again.
  static bool no_error() {
    const bool is_fine = !PyErr_Occurred();
    PyErr_Clear();
    return is_fine;
  }

  // numbers.Real: NumPy's scalars are of it.
  static PyObject* real_number() {
    if (!real_number_) real_number_ = py::object(py::module_::import("numbers").attr("Real")).release().ptr();
    return real_number_;
  }
  static inline PyObject* real_number_ = nullptr;

  PyObject* group_;
  at::Tensor lr_on_device_;
};

}  // namespace fastopt
