// Checks whether Python overrides anything that a step does with its objects. C++ overrides show in dispatch keys; a
// Python subclass or mode has none. The interpreter lock is held; no Python code runs but in prepare_ordinary().
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include "torch/context.h"

namespace fastopt {

// Looks up the Python objects that the functions below compare with; once, before any of them is called.
void prepare_ordinary();

// Of a subclass of torch.Tensor: it behaves as a Parameter, for it overrides no attribute that tensors have.
bool is_ordinary_subclass(PyTypeObject* type);

inline bool is_ordinary_tensor(PyObject* object) {
  return THPVariable_CheckTypeExact(Py_TYPE(object)) || is_ordinary_subclass(Py_TYPE(object));
}

// A dict, defaultdict or OrderedDict itself; a subclass may look its items up in its own way.
bool is_ordinary_dict(PyObject* object);

// No torch function mode is on but those of torch.device and set_default_device, which concern new tensors only.
bool is_free_of_function_modes();

// torch.zeros_like is torch's own, and new tensors go to the CPU where no device is named: then states may be made
// without torch's function for it. While no other function modes are on.
bool are_new_states_ordinary();

// A number that changes with every change of a class or its bases; 0: not known.
inline uint64_t version_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030C0000
  if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
  return type->tp_version_tag;
}

}  // namespace fastopt
