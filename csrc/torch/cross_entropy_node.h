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

// torch's own composite; in_float32: of what is floating point in float32.
at::Tensor torch_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                               bool in_float32 = false);

// The operator, through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool wants_grad,
                                                bool in_float32);

// Whatever a loss has left for its backward.
struct ForBackward {
  LossGradient gradient;  // computed with the loss, or undefined
  at::Tensor keeper;      // holds the gradient, in a traced program
  at::Tensor totals;      // of the rows, for a gradient in place; undefined where the kernel finds none
  bool is_plain;          // the loss was computed on an ordinary tensor, not on a traced one
  bool is_in_place;       // the gradient will be computed in the backward, over the logits
};

// The operator that keeps the gradient, through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_keep(const CrossEntropyArguments& arguments, c10::SymInt ignore_index);

// Makes loss a function of the arguments' input.
void record_cross_entropy(const at::Tensor& loss, const CrossEntropyArguments& arguments, c10::SymInt ignore_index,
                          ForBackward left);

}  // namespace fastopt
