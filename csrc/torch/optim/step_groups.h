// The param groups of an optimizer as a step reads them.
#pragma once

#include <array>
#include <cstring>  // memcmp, memcpy
#include <utility>  // move
#include <vector>

#include "torch/optim/optimizer_keys.h"
#include "torch/optim/ordinary.h"
#include "torch/optim/update_batch.h"

namespace fastopt {

struct StepGroup {
  py::object dict;  // held: reading another group's options may run Python code
  OptionValues options;
  bool is_capturable, is_fused;
  at::Tensor device_lr;  // or undefined
  // What the state of its parameters keeps: states, then scalars.
  int n_states, n_scalars;
  std::array<PyObject*, kMaxKept> kept_keys;
  bool makes_states;         // the step makes what an empty state lacks
  bool has_first_step_flag;  // the rule differs in a step that makes states

  int n_kept() const { return n_states + n_scalars; }
  bool wants_device_scalars() const { return is_capturable || is_fused; }  // as torch places them
};

// Everything a rule depends on beside its group.
struct StepInput {
  bool is_first = false;               // the step makes the parameter's states
  bool has_scalars_on_device = false;  // then those below are 0
  ScalarValues scalars;
  friend bool operator==(const StepInput&, const StepInput&) = default;
};

class StepGroups {
 public:
  explicit StepGroups(const Optimizer& optimizer) : optimizer_(optimizer), keys_(optimizer) {}

  void clear() {
    groups_.clear();
    forget_rules();
  }
  const StepGroup& operator[](size_t i) const { return groups_[i]; }
  const std::vector<StepGroup>& all() const { return groups_; }
  bool is_capturable() const { return is_capturable_; }  // every group
  bool have_scalars() const { return !keys_.scalars.empty(); }

  // Returns why kernels cannot take them, or null. May run Python code.
  const char* read(PyObject* groups) {
    is_capturable_ = true;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      auto dict = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups, g));
      if (!is_ordinary_dict(dict.ptr())) return "a param group is not a dict";
      GroupReader reader(dict.ptr());
      StepGroup group{};
      if (!read_options(optimizer_, keys_, reader, group.options)) {
        return "a hyper-parameter is not a plain number, or out of range";
      }
      group.is_capturable = reader.flag_or_false("capturable");
      group.is_fused = reader.flag_or_false("fused");
      if (reader.flag_or_false("differentiable")) return "differentiable is set";
      if (reader.flag_or_false("foreach") && !group.is_capturable && THPVariable_Check(reader.find(interned("lr")))) {
        return "foreach with a tensor lr";
      }
      group.dict = std::move(dict);
      group.device_lr = reader.lr_on_device();
      list_kept(group);
      is_capturable_ &= group.is_capturable;
      groups_.push_back(std::move(group));
    }
    return nullptr;
  }

  // The index in the batch of a group's rule, which it adds if the last call was for another; below 0 if there is none
  // for the dtype.
  int32_t rule(size_t group, const StepInput& input, DType dtype, UpdateBatch& batch) {
    if (last_rule_ >= 0 && group == last_group_ && dtype == last_dtype_ && input == last_input_) return last_rule_;
    OptionValues options = groups_[group].options;
    if (optimizer_.first_step_flag >= 0) optimizer_.flag(options, optimizer_.first_step_flag) = input.is_first;
    const at::Tensor& lr = groups_[group].device_lr;
    if (input.has_scalars_on_device || lr.defined()) {
      const DeviceLr device_lr = lr.defined() ? DeviceLr{lr.const_data_ptr(), *dtype_of(lr)} : DeviceLr{};
      last_rule_ = batch.add_rule(optimizer_.unfinished_rule(options, input.scalars, device_lr));
    } else {
      const auto rule = optimizer_.rule(dtype, options, input.scalars);
      if (!rule) return -1;
      last_rule_ = batch.add_rule(*rule);
    }
    last_group_ = group;
    last_input_ = input;
    last_dtype_ = dtype;
    return last_rule_;
  }
  void forget_rules() { last_rule_ = -1; }  // those of the batch are gone

  // Calls f(index of its group, parameter) for each parameter, until one returns false; then so does this. Sets `fault`
  // where a group has no list of them. Runs no Python code.
  template <class F>
  [[gnu::always_inline]] bool for_each_param(const char*& fault, F&& f) const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const params = GroupReader(groups_[g].dict.ptr()).find(interned("params"));
      if (!params || !PyList_CheckExact(params)) {
        fault = "a group's params are not a list";
        return false;
      }
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        if (!f(g, PyList_GET_ITEM(params, i))) return false;
      }
    }
    return true;
  }

 private:
  void list_kept(StepGroup& group) const {
    int n = 0;
    for (size_t s = 0; s < keys_.states.size(); ++s) {
      if (optimizer_.uses_state(group.options, static_cast<int>(s))) group.kept_keys[n++] = keys_.states[s];
    }
    group.n_states = n;
    group.n_scalars = static_cast<int>(keys_.scalars.size());
    for (PyObject* const key : keys_.scalars) group.kept_keys[n++] = key;
    group.makes_states = optimizer_.makes_states;
    group.has_first_step_flag = optimizer_.first_step_flag >= 0;
  }

  const Optimizer& optimizer_;
  const OptimizerKeys keys_;
  std::vector<StepGroup> groups_;
  bool is_capturable_ = true;

  int32_t last_rule_ = -1;  // and what it was made for
  size_t last_group_ = 0;
  StepInput last_input_;
  DType last_dtype_{};
};

}  // namespace fastopt
