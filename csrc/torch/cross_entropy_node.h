// Cross-entropy under autograd: the node whose backward hands on, or computes, the gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/cross_entropy_kernel.h"

namespace fastopt {

// Whatever a loss has left for its backward.
struct ForBackward {
  LossGradient gradient;  // computed with the loss, or undefined
  at::Tensor keeper;      // holds the gradient, in a traced program
  at::Tensor totals;      // of the rows, for a gradient in place; undefined where the kernel finds none
  bool is_plain;          // the loss was computed on an ordinary tensor, not on a traced one
  bool is_in_place;       // the gradient will be computed in the backward, over the logits
};

// Makes loss a function of the arguments' input.
void record_cross_entropy(const at::Tensor& loss, const CrossEntropyArguments& arguments, c10::SymInt ignore_index,
                          ForBackward left);

}  // namespace fastopt
