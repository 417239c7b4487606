// Reads optimizer.state and each parameter's own state. Borrowed references; no Python code runs.
#pragma once

#include <vector>

#include "torch/optim/group_reader.h"

namespace fastopt {

// The items of optimizer.state in its order. Hashing a tensor calls back into Python; walking the dict does not.
class StateItems {
 public:
  void read(PyObject* state) {
    items_.clear();
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state, &position, &key, &value)) items_.push_back({key, value});
  }

  // The state of a parameter, or null. `last_seen`: its index in the last step.
  PyObject* find(PyObject* param, size_t& last_seen) const {
    if (last_seen < items_.size() && items_[last_seen].key == param) return items_[last_seen].value;
    for (last_seen = 0; last_seen < items_.size(); ++last_seen) {
      if (items_[last_seen].key == param) return items_[last_seen].value;
    }
    return nullptr;
  }

 private:
  struct Item {
    PyObject* key;
    PyObject* value;
  };
  std::vector<Item> items_;
};

// The value of an interned key in a parameter's state, or null. States made by torch have interned keys, so pointers
// are compared first.
inline PyObject* find_item(PyObject* own_state, PyObject* wanted) {
  if (!own_state) return nullptr;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(own_state, &position, &key, &value)) {
    if (key == wanted) return value;
  }
  position = 0;
  while (PyDict_Next(own_state, &position, &key, &value)) {
    if (PyUnicode_Check(key) && PyUnicode_Compare(key, wanted) == 0) return value;
  }
  return nullptr;
}

}  // namespace fastopt
