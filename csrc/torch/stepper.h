// A step from Python's objects: what is checked before anything changes, what the kernels get, what is kept.
#pragma once

#include <ATen/ops/empty_like.h>

#include <array>
#include <iterator>  // size
#include <utility>   // move
#include <vector>

#include "torch/families.h"
#include "torch/odd_params.h"
#include "torch/optimizer_reader.h"
#include "torch/state_reader.h"
#include "torch/update_batch.h"

namespace fastopt {

// Elements from which the interpreter is let go while kernels run.
constexpr int64_t kMinElementsToReleaseGil = 1 << 16;

// One thread at a time steps.
template <class Family>
class Stepper {
 public:
  using Options = typename Family::Options;
  static constexpr int kMaxFamilyStates = static_cast<int>(std::size(Family::kStates));

  explicit Stepper(py::object is_ordinary_class) : optimizer_(std::move(is_ordinary_class)) {}

  // Updates every parameter that has a gradient, or changes nothing and returns false: then the reason is in why_not().
  // reads_scaling: what a GradScaler has left to the optimizer counts.
  bool step(const py::object& optimizer, bool reads_scaling) {
    why_not_ = "";
    try {
      const bool is_done = gather_all(optimizer.ptr(), reads_scaling) && run();
      clear();
      return is_done;
    } catch (...) {
      clear();
      throw;
    }
  }

  // The same for all parameters but some.
  bool step_without(std::vector<py::object> left_alone, const py::object& optimizer, bool reads_scaling) {
    const auto mode = odd_.leave_alone(std::move(left_alone));
    return step(optimizer, reads_scaling);
  }

  // The parameters that no kernel takes, each for a reason of its own, if kernels on the CPU can step all others and
  // those share no memory with these; else none. Changes nothing.
  std::vector<py::object> odd_params(const py::object& optimizer, bool reads_scaling) {
    const auto mode = odd_.search();
    std::vector<py::object> found;
    try {
      const bool is_split = gather_all(optimizer.ptr(), reads_scaling) && !is_scaled_ && batch_.size() > 0 &&
                            !batch_.has(Backend::kCuda) && odd_.are_apart(batch_, walk_, steps_in_memory());
      if (is_split) found = odd_.params();
    } catch (...) {
      clear();
      throw;
    }
    clear();
    return found;
  }

  const char* why_not() const { return why_not_; }

 private:
  struct Group {
    py::object dict;  // held: reading another group's options may run Python code
    Options options;
    bool is_capturable;
    bool wants_device_steps;  // as torch places them: capturable or fused
    at::Tensor device_lr;     // or undefined
  };

  struct Entry {
    size_t group;
    double count;  // of steps, this one included; 0 if the kernel counts
    void* step;    // the number in the step tensor, or null
    c10::TensorImpl* step_tensor;
    bool is_step_double;

    double next_count() const {
      if (is_step_double) return *static_cast<const double*>(step) + 1;
      return static_cast<double>(*static_cast<const float*>(step) + 1);
    }
  };

  // A state that is made in this step, and the dict that takes it: null until the parameter has one.
  struct MadeState {
    at::Tensor tensor;
    py::object own_state;
  };

  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  void clear() {
    batch_.clear();
    entries_.clear();
    groups_.clear();
    made_states_.clear();
    without_state_.clear();
    odd_.clear();
    optimizer_.clear();
    last_rule_ = -1;
  }

  // Checks everything and changes nothing, but that a parameter may get an empty state.
  bool gather_all(PyObject* optimizer, bool reads_scaling) {
    if (!is_quiet()) return refuse("a dispatch mode or a transform is on");
    if (!is_free_of_function_modes()) return refuse("a torch function mode is on");
    if (is_forward_mode_on()) return refuse("forward-mode differentiation is on");
    for (;;) {
      clear();
      if (!optimizer_.read(optimizer, reads_scaling)) return refuse(optimizer_.why_not());
      is_scaled_ = optimizer_.grad_scale() || optimizer_.found_inf();
      // Options first, for they may run Python code; then tensors, while no other thread can change them.
      if (!read_groups(optimizer_.groups()) || !gather(optimizer_.state())) return false;
      is_skipped_ = must_know_ && optimizer_.found_inf() && optimizer_.found_inf()->item().toDouble() > 0;
      if (is_skipped_ || without_state_.empty()) break;
      if (odd_.is_search() || !makes_dicts(optimizer_.state())) return refuse("a parameter has no state");
      add_empty_states(optimizer_.state());
    }
    if (is_scaled_ && batch_.has(Backend::kCpu)) return refuse("a GradScaler's numbers are for tensors on the CPU");
    if (batch_.has_overlap()) return refuse("tensors share memory");
    if (Family::kHasStep && !is_capturable_ && batch_.is_capturing()) {
      return refuse("a CUDA graph is captured, and capturable is not set");
    }
    return true;
  }

  bool run() {
    if (is_skipped_) return true;
    const at::Tensor* const found_inf = optimizer_.found_inf();
    count_steps();
    if (batch_.numel() >= kMinElementsToReleaseGil) {
      batch_.hold();
      py::gil_scoped_release no_gil;
      batch_.run(optimizer_.grad_scale(), found_inf);
    } else {
      batch_.run(optimizer_.grad_scale(), found_inf);
    }
    keep_made_states();
    return true;
  }

  bool read_groups(PyObject* groups) {
    is_capturable_ = true;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      auto dict = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups, g));
      if (!is_ordinary_dict(dict.ptr())) return refuse("a param group is not a dict");
      GroupReader reader(dict.ptr());
      Options options;
      if (!Family::read(reader, options)) return refuse("a hyper-parameter is not a plain number, or out of range");
      const bool is_capturable = reader.flag_or_false("capturable"), is_fused = reader.flag_or_false("fused");
      if (reader.flag_or_false("differentiable")) return refuse("differentiable is set");
      if (reader.flag_or_false("foreach") && !is_capturable && THPVariable_Check(reader.find("lr"))) {
        return refuse("foreach with a tensor lr");
      }
      is_capturable_ &= is_capturable;
      groups_.push_back({std::move(dict), options, is_capturable, is_capturable || is_fused, reader.lr_on_device()});
    }
    return true;
  }

  bool gather(PyObject* state) {
    must_know_ = false;
    walk_.read(state);
    size_t n_params = 0;
    const bool leaves_some = odd_.leaves_some();
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const params = GroupReader(groups_[g].dict.ptr()).find("params");
      if (!params || !PyList_CheckExact(params)) return refuse("a group's params are not a list");
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        if (guesses_.size() <= n_params) guesses_.push_back(n_params);
        PyObject* const param = PyList_GET_ITEM(params, i);
        size_t& guess = guesses_[n_params++];
        if (leaves_some && odd_.is_left_alone(param)) continue;
        if (!gather_param(g, param, guess) && !odd_.take_refused(param)) return false;
      }
    }
    return true;
  }

  [[gnu::always_inline]] bool gather_param(size_t group_index, PyObject* object, size_t& guess) {
    if (!THPVariable_Check(object)) return refuse("a parameter is not a tensor");
    const at::Tensor& param = THPVariable_Unpack(object);
    if (!is_ordinary_tensor(object)) return refuse("a parameter's class overrides what a step does");
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return true;
    if (!is_ordinary(grad)) return refuse("a gradient's class overrides what a step does");

    const Group& group = groups_[group_index];
    const Options& options = group.options;
    const bool is_cuda = backend_of(param) == Backend::kCuda;
    if (group.is_capturable && !is_cuda) return refuse("capturable is set for a parameter on the CPU");
    if (group.device_lr.defined() && (!is_cuda || group.device_lr.device() != param.device())) {
      return refuse("lr is on another device");
    }
    Entry entry{group_index, 0, nullptr, nullptr, false};
    bool is_first = false;
    const at::Tensor* step_on_device = nullptr;
    std::array<const at::Tensor*, kMaxFamilyStates + 1> states{};
    int n_states = 0;
    bool uses_any = Family::kHasStep;
    for (int s = 0; s < kMaxFamilyStates; ++s) uses_any |= Family::uses_state(options, s);
    PyObject* const own_state = uses_any ? walk_.find(object, guess) : nullptr;
    if (own_state && !is_ordinary_dict(own_state)) return refuse("a parameter's state is not a dict");
    if constexpr (Family::kHasStep) {
      const at::Tensor* step = find_tensor(own_state, "step");
      if (!step) return refuse("state is not there yet");
      entry.is_step_double = step->scalar_type() == at::kDouble;
      if (step->numel() != 1 || !(entry.is_step_double || step->scalar_type() == at::kFloat)) {
        return refuse("a step is not a number");
      }
      if (step->is_inference()) return refuse("a step was made in inference mode");
      // A default device places steps too, whatever the options.
      const bool is_on_device = group.wants_device_steps || !is_plain_cpu(*step);
      if (is_cuda && is_on_device && backend_of(*step) == Backend::kCuda) {
        if (step->device() != param.device()) return refuse("a step is on another device");
        step_on_device = step;
      } else {
        if (group.is_capturable || is_scaled_) return refuse("a step is not on its parameter's device");
        if (!is_plain_cpu(*step)) return refuse("a step is not in CPU memory");
        check_backed(*step, "a step");
        entry.step_tensor = step->unsafeGetTensorImpl();
        entry.step = step->mutable_data_ptr();
        entry.count = entry.next_count();
        if (!(entry.count >= 1)) return refuse("a step is negative");
      }
    }
    for (int s = 0; s < kMaxFamilyStates; ++s) {
      if (!Family::uses_state(options, s)) continue;
      const at::Tensor* tensor = find_tensor(own_state, Family::kStates[s]);
      if (!tensor) {
        PyObject* const other = find_item(own_state, Family::kStates[s]);
        if (!Family::kMakesStates || (other && other != Py_None)) return refuse("state is not there yet");
        // A first step that is skipped makes no state: whether this one is cannot be left to the kernel.
        must_know_ |= is_scaled_;
        if (!own_state) without_state_.push_back(py::reinterpret_borrow<py::object>(object));
        made_states_.push_back({at::empty_like(param), py::reinterpret_borrow<py::object>(own_state)});
        tensor = &made_states_.back().tensor;
        is_first = true;
      }
      states[n_states++] = tensor;
    }
    if (!Family::kHasStep) entry.count = is_first ? 1 : 2;
    if (!batch_.add(param, grad, states.data(), n_states)) {
      odd_.note_refused(object);
      return refuse(batch_.why_not());
    }
    if (step_on_device) batch_.count_on_device(batch_.size() - 1, *step_on_device);
    entries_.push_back(entry);
    return give_rule(batch_.size() - 1) || refuse("a hyper-parameter is beyond the range of float32");
  }

  // Gives a tensor the rule of its group and count; false if there is none for its dtype.
  bool give_rule(int64_t i) {
    const Entry& entry = entries_[i];
    const Group& group = groups_[entry.group];
    const DType dtype = batch_.dtype(i);
    if (last_rule_ < 0 || entry.group != last_group_ || entry.count != last_count_ || dtype != last_dtype_) {
      StepCount count(entry.count);
      count.is_on_device = entry.count == 0 || group.device_lr.defined();
      if (group.device_lr.defined()) {
        count.lr = group.device_lr.const_data_ptr();
        count.lr_dtype = *dtype_of(group.device_lr);
      }
      const auto rule = Family::rule(dtype, group.options, count);
      if (!rule) return false;
      last_rule_ = batch_.add_rule(*rule);
      last_group_ = entry.group;
      last_count_ = entry.count;
      last_dtype_ = dtype;
    }
    batch_.set_rule(i, last_rule_);
    return true;
  }

  // Whether looking up a parameter that has no state makes an empty one: in a plain dict it is an error.
  static bool makes_dicts(PyObject* state) {
    const auto factory = py::reinterpret_steal<py::object>(PyObject_GetAttrString(state, "default_factory"));
    PyErr_Clear();
    return factory.ptr() == reinterpret_cast<PyObject*>(&PyDict_Type);
  }

  // Gives each parameter that has none a state to which the one made in this step is added. Runs Python code.
  void add_empty_states(PyObject* state) {
    const auto params = std::move(without_state_);
    for (const py::object& param : params) {
      if (!PyDict_SetDefault(state, param.ptr(), py::dict().ptr())) throw py::error_already_set();
    }
  }

  std::vector<const void*> steps_in_memory() const {
    std::vector<const void*> steps;
    for (const Entry& entry : entries_) steps.push_back(entry.step);
    return steps;
  }

  // Counts each parameter's step up, in order.
  void count_steps() {
    for (int64_t i = 0; i < batch_.size(); ++i) {
      Entry& entry = entries_[i];
      if (!entry.step) continue;
      const double count = entry.next_count();
      if (entry.is_step_double) {
        *static_cast<double*>(entry.step) = count;
      } else {
        *static_cast<float*>(entry.step) = static_cast<float>(count);
      }
      entry.step_tensor->bump_version();
      if (count == entry.count) continue;
      entry.count = count;  // parameters share a count, which has moved since it was read
      give_rule(i);
    }
  }

  // No Python code runs: nothing can come between the update and its state.
  void keep_made_states() {
    for (MadeState& made : made_states_) {
      const auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(made.tensor)));
      if (!tensor || PyDict_SetItem(made.own_state.ptr(), interned(Family::kStates[0]), tensor.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  }

  OptimizerReader optimizer_;
  UpdateBatch batch_;
  StateWalk walk_;
  OddParams odd_;
  std::vector<Entry> entries_;
  std::vector<Group> groups_;
  std::vector<MadeState> made_states_;
  std::vector<py::object> without_state_;  // parameters
  bool is_scaled_ = false;
  bool must_know_ = false;       // before the launch, whether a scaler skips the step
  bool is_skipped_ = false;      // it does
  bool is_capturable_ = true;    // every group
  std::vector<size_t> guesses_;  // where each parameter's state was in the walk
  const char* why_not_ = "";

  int32_t last_rule_ = -1;  // and what it was made for
  size_t last_group_ = 0;
  double last_count_ = 0;
  DType last_dtype_{};
};

}  // namespace fastopt
