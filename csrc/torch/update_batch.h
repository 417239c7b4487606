// Tensors of one optimizer step, checked, then updated in one parallel region.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "rules/rules.h"
#include "torch/context.h"

namespace fastopt {

class UpdateBatch {
 public:
  void clear();

  // Takes a parameter, its gradient and states if a kernel can update them; else returns false, and why_not() tells.
  // The rule is given when all tensors are taken: set_rule(index of the tensor, rule).
  bool add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* const* states, int n_states);
  int64_t size() const { return static_cast<int64_t>(slabs_.size()); }
  DType dtype(int64_t i) const { return slabs_[i].dtype; }

  // Whether tensors that would be written share memory with each other or with a gradient.
  bool has_overlap();

  int32_t add_rule(const RuleValue& rule);
  void set_rule(int64_t i, int32_t rule) { slabs_[i].rule = rule; }

  // Runs the kernels and bumps the version of each tensor written.
  void run();

  const char* why_not() const { return why_not_; }
  int64_t numel() const { return numel_; }

 private:
  bool refuse(const char* why) {
    why_not_ = why;
    return false;
  }

  std::vector<Slab> slabs_;
  std::vector<RuleValue> rules_;
  std::vector<c10::TensorImpl*> written_;     // the parameters and states of slabs_
  std::vector<c10::TensorImpl*> grad_impls_;  // one for each slab
  std::vector<at::Tensor> copies_;            // gradients brought into their parameter's layout
  int64_t numel_ = 0;
  const char* why_not_ = "";

  // The last set of written memory found free of overlap, and its storages; most steps write the same memory.
  uint64_t checked_fingerprint_ = 0;
  bool checked_overlap_ = false;
  std::vector<const void*> storages_;
};

}  // namespace fastopt
