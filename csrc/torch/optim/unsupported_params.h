// The parameters of a step that no kernel takes, each for a reason of its own, while kernels can step the others.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>  // all_of, any_of
#include <utility>    // move
#include <vector>

#include "torch/optim/state_reader.h"
#include "torch/optim/update_batch.h"

namespace fastopt {

class UnsupportedParams {
 public:
  // How a step treats them while the Mode lives: it collects all of them, or leaves some alone. Without a Mode it ends
  // at the first one.
  class Mode {
   public:
    explicit Mode(UnsupportedParams& params) : params_(params) {}
    ~Mode() {
      params_.is_search_ = false;
      params_.left_alone_.clear();
    }
    Mode(const Mode&) = delete;

   private:
    UnsupportedParams& params_;
  };
  Mode search() {
    is_search_ = true;
    return Mode(*this);
  }
  Mode leave_alone(std::vector<py::object> params) {
    left_alone_ = std::move(params);
    return Mode(*this);
  }

  void clear() {
    params_.clear();
    refused_ = nullptr;
  }
  bool is_search() const { return is_search_; }
  bool leaves_some() const { return !left_alone_.empty(); }
  bool is_left_alone(PyObject* param) const {
    return std::any_of(left_alone_.begin(), left_alone_.end(),
                       [&](const py::object& other) { return other.ptr() == param; });
  }

  // A parameter was refused for a reason of its own; whether it is one, and may be passed over.
  void note_refused(PyObject* param) { refused_ = param; }
  bool take_refused(PyObject* param) {
    if (!is_search_ || refused_ != param) return false;
    params_.push_back(py::reinterpret_borrow<py::object>(param));
    return true;
  }
  const std::vector<py::object>& params() const { return params_; }

  // True if no tensor of a batch shares memory with them, their gradients or their states; false where that is unknown.
  bool are_apart(const UpdateBatch& batch, const StateItems& state_items) const {
    return std::all_of(params_.begin(), params_.end(), [&](const py::object& param) {
      const at::Tensor& tensor = THPVariable_Unpack(param.ptr());
      if (tensor.layout() != at::kStrided || !is_apart(tensor, batch)) return false;
      if (!is_apart(tensor.unsafeGetTensorImpl()->grad(), batch)) return false;
      size_t last_seen = 0;
      PyObject* const own_state = state_items.find(param.ptr(), last_seen);
      if (own_state && !is_ordinary_dict(own_state)) return false;
      Py_ssize_t position = 0;
      PyObject *key, *value;
      while (own_state && PyDict_Next(own_state, &position, &key, &value)) {
        if (!THPVariable_Check(value)) continue;
        if (!is_ordinary_tensor(value) || !is_apart(THPVariable_Unpack(value), batch)) return false;
      }
      return true;
    });
  }

 private:
  static bool is_apart(const at::Tensor& tensor, const UpdateBatch& batch) {
    if (tensor.is_sparse()) {
      return is_apart(tensor._indices(), batch) && is_apart(tensor._values(), batch);
    }
    if (tensor.layout() != at::kStrided || !tensor.has_storage() || !is_backed(tensor)) return false;
    const auto [begin, end] = memory_range(tensor);
    return !batch.uses(begin, end);
  }

  bool is_search_ = false;
  std::vector<py::object> left_alone_;
  PyObject* refused_ = nullptr;  // the last one
  std::vector<py::object> params_;
};

}  // namespace fastopt
