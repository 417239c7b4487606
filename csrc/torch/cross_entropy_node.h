// Cross-entropy under autograd: the node whose backward hands on, or computes, the gradient; and what it calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "torch/cross_entropy_kernel.h"

namespace fastopt {

using OptionalTensor = std::optional<at::Tensor>;

inline const at::Tensor* pointer_to(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

// torch's own composite.
at::Tensor torch_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing);

// The operator, through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool wants_grad);

// Makes loss a function of the arguments' input. `grad` was computed with it; is_plain: on an ordinary tensor, not on a
// traced one; is_in_place: in the backward it will be, over the logits, with the totals that the loss has left.
void record_cross_entropy(const at::Tensor& loss, const at::Tensor& grad, const CrossEntropyArguments& arguments,
                          c10::SymInt ignore_index, bool is_plain, bool is_in_place, at::Tensor totals);

}  // namespace fastopt
