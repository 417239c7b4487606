// The param groups of an optimizer as a step reads them.
#pragma once

#include <utility>  // move
#include <vector>

#include "torch/found_param.h"

namespace fastopt {

template <class Family>
class StepGroups {
 public:
  struct Group {
    py::object dict;  // held: reading another group's options may run Python code
    typename Family::Options options;
    bool is_capturable;
    bool wants_device_steps;  // as torch places them: capturable or fused
    at::Tensor device_lr;     // or undefined
  };

  void clear() {
    groups_.clear();
    forget_rules();
  }
  const Group& operator[](size_t i) const { return groups_[i]; }
  const std::vector<Group>& all() const { return groups_; }
  bool is_capturable() const { return is_capturable_; }  // every group

  // Returns why kernels cannot take them, or null. May run Python code.
  const char* read(PyObject* groups) {
    is_capturable_ = true;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      auto dict = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups, g));
      if (!is_ordinary_dict(dict.ptr())) return "a param group is not a dict";
      GroupReader reader(dict.ptr());
      typename Family::Options options;
      if (!Family::read(reader, options)) return "a hyper-parameter is not a plain number, or out of range";
      const bool is_capturable = reader.flag_or_false("capturable"), is_fused = reader.flag_or_false("fused");
      if (reader.flag_or_false("differentiable")) return "differentiable is set";
      if (reader.flag_or_false("foreach") && !is_capturable && THPVariable_Check(reader.find("lr"))) {
        return "foreach with a tensor lr";
      }
      is_capturable_ &= is_capturable;
      groups_.push_back({std::move(dict), options, is_capturable, is_capturable || is_fused, reader.lr_on_device()});
    }
    return nullptr;
  }

  // The index in the batch of the rule of a group for a count of steps, which it adds if the last call was for another;
  // below 0 if there is none for the dtype.
  int32_t rule(size_t group, double count, DType dtype, UpdateBatch& batch) {
    if (last_rule_ >= 0 && group == last_group_ && count == last_count_ && dtype == last_dtype_) return last_rule_;
    const at::Tensor& lr = groups_[group].device_lr;
    StepCount step(count);
    step.is_on_device = count == 0 || lr.defined();
    if (lr.defined()) {
      step.lr = lr.const_data_ptr();
      step.lr_dtype = *dtype_of(lr);
    }
    const auto rule = Family::rule(dtype, groups_[group].options, step);
    if (!rule) return -1;
    last_group_ = group;
    last_count_ = count;
    last_dtype_ = dtype;
    return last_rule_ = batch.add_rule(*rule);
  }
  void forget_rules() { last_rule_ = -1; }  // those of the batch are gone

  // Calls f(index of its group, parameter) for each parameter, until one returns false; then so does this. Sets `fault`
  // where a group has no list of them. Runs no Python code.
  template <class F>
  [[gnu::always_inline]] bool for_each_param(const char*& fault, F&& f) const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const params = GroupReader(groups_[g].dict.ptr()).find("params");
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
  std::vector<Group> groups_;
  bool is_capturable_ = true;

  int32_t last_rule_ = -1;  // and what it was made for
  size_t last_group_ = 0;
  double last_count_ = 0;
  DType last_dtype_{};
};

}  // namespace fastopt
