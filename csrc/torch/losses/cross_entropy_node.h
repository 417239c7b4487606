// Cross-entropy under autograd: the node whose backward returns or computes the gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/losses/cross_entropy_kernel.h"

namespace fastopt {

// Results of the forward that the backward needs.
struct SavedForBackward {
  LossGradient gradient;  // computed with the loss; undefined if there is a keeper, and in place
  at::Tensor keeper;      // owns the gradient, in a traced program
  at::Tensor totals;      // of the rows, for a gradient in place; undefined if the kernel computes none
  bool is_plain;          // the loss was computed on an ordinary tensor, not on a traced one
  bool is_in_place;       // the backward will compute the gradient in the memory of the logits
};

// Makes loss a function of the arguments' input.
void record_cross_entropy(const at::Tensor& loss, const CrossEntropyArguments& arguments, SavedForBackward saved);

}  // namespace fastopt
