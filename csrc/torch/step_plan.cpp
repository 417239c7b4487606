#include "torch/step_plan.h"

#include <ATen/ops/empty_like.h>

#include <array>
#include <iterator>  // size
#include <mutex>
#include <optional>
#include <vector>

#include "torch/families.h"
#include "torch/group_reader.h"
#include "torch/update_batch.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// Elements from which the interpreter is let go while kernels run.
constexpr int64_t kMinElementsToReleaseGil = 1 << 16;

// The items of optimizer.state in its order. Hashing a tensor calls back into Python; walking the dict does not.
class StateWalk {
 public:
  void read(PyObject* state) {
    items_.clear();
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state, &position, &key, &value)) items_.push_back({key, value});
  }

  // The state of a parameter, or null. `guess` is where it was last time.
  PyObject* find(PyObject* state, PyObject* param, size_t& guess) const {
    if (guess < items_.size() && items_[guess].key == param) return items_[guess].value;
    for (guess = 0; guess < items_.size(); ++guess) {
      if (items_[guess].key == param) return items_[guess].value;
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

template <class Family>
class StepPlan {
 public:
  using Options = typename Family::Options;
  static constexpr int kMaxFamilyStates = static_cast<int>(std::size(Family::kStates));

  // Updates every parameter that has a gradient, or changes nothing and returns false: then the reason is in why_not().
  // grad_scale and found_inf are a GradScaler's tensors, or None.
  bool step(const py::object& groups, const py::dict& state, const std::optional<at::Tensor>& grad_scale,
            const std::optional<at::Tensor>& found_inf) {
    // A second thread in the same optimizer waits, without the interpreter lock that the first one needs to finish.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      py::gil_scoped_release no_gil;
      lock.lock();
    }
    if (!is_quiet()) return refuse("a dispatch mode or a transform is on");
    batch_.clear();
    entries_.clear();
    groups_.clear();
    is_capturable_ = true;
    must_know_ = false;
    is_scaled_ = grad_scale.has_value() || found_inf.has_value();
    if (!PyList_Check(groups.ptr())) return refuse("the param groups are not a list");
    if (!gather(groups.ptr(), state.ptr())) return false;
    if (is_scaled_ && batch_.has_cpu()) return refuse("a GradScaler's numbers are for tensors on the CPU");
    if (batch_.has_overlap()) return refuse("tensors share memory");
    if (Family::kHasStep && !is_capturable_ && batch_.is_capturing()) {
      return refuse("a CUDA graph is captured, and capturable is not set");
    }
    if (must_know_ && found_inf.has_value() && found_inf->item().toDouble() > 0) return true;  // nothing to do
    set_rules();
    const at::Tensor* scale = grad_scale.has_value() ? &*grad_scale : nullptr;
    const at::Tensor* found = found_inf.has_value() ? &*found_inf : nullptr;
    if (batch_.numel() >= kMinElementsToReleaseGil) {
      py::gil_scoped_release no_gil;
      batch_.run(scale, found);
    } else {
      batch_.run(scale, found);
    }
    if constexpr (Family::kMakesStates) keep_made_states(state.ptr());
    return true;
  }

  const char* why_not() const { return why_not_; }

 private:
  struct Group {
    Options options;
    bool is_capturable;
    bool wants_device_steps;      // as torch places them: capturable or fused
    const at::Tensor* device_lr;  // or null
  };

  struct Entry {
    int32_t group;
    void* step;  // the number in the step tensor, or null: the kernel counts
    at::TensorImpl* step_tensor;
    bool is_step_double;
    PyObject* param;  // of states made in this step
    at::Tensor made_state;
  };

  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  // Checks everything and changes nothing.
  bool gather(PyObject* groups, PyObject* state) {
    walk_.read(state);
    size_t n_params = 0;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      PyObject* group = PyList_GET_ITEM(groups, g);
      if (!PyDict_Check(group)) return refuse("a param group is not a dict");
      GroupReader reader(group);
      Options options;
      if (!Family::read(reader, options)) return refuse("a hyper-parameter is not a plain number, or out of range");
      const bool is_capturable = reader.flag_or_false("capturable"), is_fused = reader.flag_or_false("fused");
      if (reader.flag_or_false("differentiable")) return refuse("differentiable is set");
      if (reader.flag_or_false("foreach") && !is_capturable && THPVariable_Check(reader.find("lr"))) {
        return refuse("foreach with a tensor lr");
      }
      is_capturable_ &= is_capturable;
      groups_.push_back({options, is_capturable, is_capturable || is_fused, reader.lr_on_device()});
      PyObject* params = reader.find("params");
      if (!params || !PyList_Check(params)) return refuse("a group's params are not a list");
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        if (guesses_.size() <= n_params) guesses_.push_back(n_params);
        if (!gather_param(PyList_GET_ITEM(params, i), state, guesses_[n_params++])) return false;
      }
    }
    return true;
  }

  bool gather_param(PyObject* object, PyObject* state, size_t& guess) {
    if (!THPVariable_Check(object)) return refuse("a parameter is not a tensor");
    const at::Tensor& param = THPVariable_Unpack(object);
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return true;

    const Group& group = groups_.back();
    const Options& options = group.options;
    const bool is_cuda = backend_of(param) == Backend::kCuda;
    if (group.is_capturable && !is_cuda) return refuse("capturable is set for a parameter on the CPU");
    if (group.device_lr && (!is_cuda || group.device_lr->device() != param.device())) {
      return refuse("lr is on another device");
    }
    Entry entry{static_cast<int32_t>(groups_.size()) - 1, nullptr, nullptr, false, nullptr, {}};
    const at::Tensor* step_on_device = nullptr;
    std::array<const at::Tensor*, kMaxFamilyStates + 1> states{};
    int n_states = 0;
    bool uses_any = Family::kHasStep;
    for (int s = 0; s < kMaxFamilyStates; ++s) uses_any |= Family::uses_state(options, s);
    PyObject* own_state = uses_any ? walk_.find(state, object, guess) : nullptr;
    if (own_state && !PyDict_Check(own_state)) return refuse("a parameter's state is not a dict");
    if constexpr (Family::kHasStep) {
      const at::Tensor* step = find_tensor(own_state, "step");
      if (!step) return refuse("state is not there yet");
      const bool is_double = step->scalar_type() == at::kDouble;
      if (step->numel() != 1 || !(is_double || step->scalar_type() == at::kFloat)) {
        return refuse("a step is not a number");
      }
      if (is_cuda && group.wants_device_steps && backend_of(*step) == Backend::kCuda) {
        if (step->device() != param.device()) return refuse("a step is on another device");
        step_on_device = step;
      } else {
        if (group.is_capturable || is_scaled_) return refuse("a step is not on its parameter's device");
        if (!is_plain_cpu(*step)) return refuse("a step is not in CPU memory");
        entry.step_tensor = step->unsafeGetTensorImpl();
        entry.step = step->mutable_data_ptr();
        entry.is_step_double = is_double;
        const double count = is_double ? *static_cast<double*>(entry.step) : *static_cast<float*>(entry.step);
        if (!(count >= 0)) return refuse("a step is negative");
      }
    }
    for (int s = 0; s < kMaxFamilyStates; ++s) {
      if (!Family::uses_state(options, s)) continue;
      const at::Tensor* tensor = find_tensor(own_state, Family::kStates[s]);
      if (!tensor) {
        if (!Family::kMakesStates || has_entry(own_state, Family::kStates[s])) return refuse("state is not there yet");
        // A first step that is skipped makes no state: whether this one is cannot be left to the kernel.
        must_know_ |= is_scaled_;
        entry.made_state = at::empty_like(param);
        entry.param = object;
        tensor = &entry.made_state;
      }
      states[n_states++] = tensor;
    }
    if (!batch_.add(param, grad, states.data(), n_states)) return refuse(batch_.why_not());
    if (step_on_device) batch_.count_on_device(batch_.size() - 1, *step_on_device);
    entries_.push_back(std::move(entry));
    return true;
  }

  // A tensor in a parameter's state, or null. Names compare by pointer first: states made by torch have interned keys.
  static const at::Tensor* find_tensor(PyObject* own_state, const char* name) {
    if (!own_state) return nullptr;
    PyObject* wanted = interned(name);
    Py_ssize_t position = 0;
    PyObject *key, *value;
    PyObject* found = nullptr;
    while (PyDict_Next(own_state, &position, &key, &value)) {
      if (key == wanted) {
        found = value;
        break;
      }
    }
    if (!found) found = PyDict_GetItem(own_state, wanted);
    return found && THPVariable_Check(found) ? &THPVariable_Unpack(found) : nullptr;
  }

  // Whether a parameter's state has something by that name, if only something odd.
  static bool has_entry(PyObject* own_state, const char* name) {
    PyObject* found = own_state ? PyDict_GetItem(own_state, interned(name)) : nullptr;
    return found && found != Py_None;
  }

  // Counts each parameter's step up, in order, and gives it the rule of that step.
  void set_rules() {
    int32_t rule = -1, rule_group = -1;
    double rule_step = 0;
    DType rule_dtype{};
    for (int64_t i = 0; i < batch_.size(); ++i) {
      const Entry& entry = entries_[i];
      double step = entry.made_state.defined() ? 1 : 2;
      if (entry.step) {
        step = entry.is_step_double ? ++*static_cast<double*>(entry.step)
                                    : static_cast<double>(++*static_cast<float*>(entry.step));
        entry.step_tensor->bump_version();
      } else if (Family::kHasStep) {
        step = 0;  // not known here
      }
      if (rule < 0 || entry.group != rule_group || step != rule_step || batch_.dtype(i) != rule_dtype) {
        rule_group = entry.group;
        rule_step = step;
        rule_dtype = batch_.dtype(i);
        const Group& group = groups_[rule_group];
        StepCount count(step);
        count.is_on_device = (Family::kHasStep && !entry.step) || group.device_lr;
        if (group.device_lr) {
          count.lr = group.device_lr->const_data_ptr();
          count.lr_dtype = *dtype_of(*group.device_lr);
        }
        rule = batch_.add_rule(Family::rule(rule_dtype, group.options, count));
      }
      batch_.set_rule(i, rule);
    }
  }

  void keep_made_states(PyObject* state) {
    for (Entry& entry : entries_) {
      if (!entry.made_state.defined()) continue;
      // optimizer.state is a defaultdict: asking for a missing parameter makes its dict.
      py::object own_state = py::reinterpret_steal<py::object>(PyObject_GetItem(state, entry.param));
      if (!own_state) throw py::error_already_set();
      py::object tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(entry.made_state));
      if (PyObject_SetItem(own_state.ptr(), interned(Family::kStates[0]), tensor.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  }

  std::mutex mutex_;
  UpdateBatch batch_;
  StateWalk walk_;
  std::vector<Entry> entries_;
  std::vector<Group> groups_;
  bool is_scaled_ = false;
  bool must_know_ = false;       // before the launch, whether a scaler skips the step
  bool is_capturable_ = true;    // every group
  std::vector<size_t> guesses_;  // where each parameter's state was in the walk
  const char* why_not_ = "";
};

template <class Family>
void bind_plan(py::module_& module, const char* name) {
  py::class_<StepPlan<Family>>(module, name)
      .def(py::init<>())
      .def("step", &StepPlan<Family>::step, py::arg("param_groups"), py::arg("state"),
           py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none())
      .def("why_not", &StepPlan<Family>::why_not);
}

}  // namespace

void bind_step_plans(py::module_& module) {
  bind_plan<SgdFamily>(module, "SgdPlan");
  bind_plan<RmsPropFamily>(module, "RmsPropPlan");
  bind_plan<AdamFamily>(module, "AdamPlan");
}

}  // namespace fastopt
