#include "torch/optim/ordinary.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/PyInterpreter.h>

#include <array>

namespace fastopt {
namespace {

namespace py = pybind11;

// Names in a class body that say nothing of how its objects compute.
constexpr const char* kHarmlessNames[] = {
    "__module__",        "__qualname__",   "__doc__",           "__dict__",           "__weakref__",  "__annotations__",
    "__init__",          "__new__",        "__init_subclass__", "__repr__",           "__str__",      "__format__",
    "__reduce__",        "__reduce_ex__",  "__deepcopy__",      "__getstate__",       "__setstate__", "__slots__",
    "__class_getitem__", "__orig_bases__", "__parameters__",    "__abstractmethods__"};

// An attribute of a module, kept for ever.
PyObject* attribute(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

// Never freed: the interpreter may be gone before this library is.
struct PythonObjects {
  PyObject* overriding_names;  // of the attributes that a subclass of torch.Tensor overrides if it has them
  PyObject* torch_function;    // the name
  PyObject* disabled_torch_function;
  PyObject* default_dict;
  PyObject* ordered_dict;
  PyObject* device_context;
  PyObject* torch_dict;
  PyObject* zeros_like;
};
PythonObjects objects{};

PyObject* dict_of(PyTypeObject* type) {
#if PY_VERSION_HEX >= 0x030C0000
  PyObject* dict = PyType_GetDict(type);  // a new reference; the type keeps one
  Py_XDECREF(dict);
  return dict;
#else
  return type->tp_dict;
#endif
}

bool overrides_nothing(PyTypeObject* type) {
  bool is_disabled = false;
  PyObject* const bases = type->tp_mro;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(bases); ++i) {
    PyObject* const base = PyTuple_GET_ITEM(bases, i);
    if (base == ParameterClass) return true;
    if (base == THPVariableClass) return is_disabled;
    Py_ssize_t position = 0;
    PyObject *name, *value;
    while (PyDict_Next(dict_of(reinterpret_cast<PyTypeObject*>(base)), &position, &name, &value)) {
      if (value == objects.disabled_torch_function && PyUnicode_Compare(name, objects.torch_function) == 0) {
        is_disabled = true;
      } else if (PySet_Contains(objects.overriding_names, name) != 0) {
        PyErr_Clear();
        return false;
      }
    }
  }
  return false;
}

}  // namespace

void prepare_ordinary() {
  py::set names(py::reinterpret_steal<py::object>(PyObject_Dir(THPVariableClass)));
  for (const char* name : kHarmlessNames) PySet_Discard(names.ptr(), py::str(name).ptr());
  objects = {names.release().ptr(),
             py::str("__torch_function__").release().ptr(),
             attribute("torch._C", "_disabled_torch_function_impl"),
             attribute("collections", "defaultdict"),
             attribute("collections", "OrderedDict"),
             attribute("torch.utils._device", "DeviceContext"),
             attribute("torch", "__dict__"),
             attribute("torch", "zeros_like")};
}

bool is_ordinary_subclass(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    uint64_t version;
    bool is_ordinary;
  };
  static std::array<Known, 8> known{};
  static size_t next = 0;
  const uint64_t version = version_of(type);
  for (const Known& entry : known) {
    if (entry.type == type && entry.version == version && version != 0) return entry.is_ordinary;
  }
  const bool is_ordinary = overrides_nothing(type);
  known[next++ % known.size()] = {type, version, is_ordinary};
  return is_ordinary;
}

bool is_ordinary_dict(PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return PyDict_CheckExact(object) || type == objects.default_dict || type == objects.ordered_dict;
}

bool is_free_of_function_modes() {
  if (!at::impl::torch_function_mode_enabled()) return true;
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
    PyObject* mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != objects.device_context) return false;
  }
  return true;
}

bool are_new_states_ordinary() {
  if (PyDict_GetItemString(objects.torch_dict, "zeros_like") != objects.zeros_like) return false;
  if (!at::impl::torch_function_mode_enabled()) return true;
  const int64_t n_modes = at::impl::PythonTorchFunctionTLS::stack_len();
  PyObject* const innermost = at::impl::PythonTorchFunctionTLS::get_stack_at(n_modes - 1)->ptr(getPyInterpreter());
  const auto device = py::reinterpret_steal<py::object>(PyObject_GetAttrString(innermost, "device"));
  PyErr_Clear();
  return device && THPDevice_Check(device.ptr()) && reinterpret_cast<THPDevice*>(device.ptr())->device.is_cpu();
}

}  // namespace fastopt
