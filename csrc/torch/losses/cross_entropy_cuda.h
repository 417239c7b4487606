// Cross-entropy by the CUDA library.
#pragma once

#include <ATen/core/Tensor.h>

#include "losses/cross_entropy.h"
#include "torch/losses/cross_entropy_kernel.h"

namespace fastopt {

// Launches the problem on the device of its tensors and returns the loss without waiting. A target that is not a class
// makes its loss and its row of the gradient NaN.
at::Tensor cross_entropy_cuda(const CrossEntropyArguments& arguments, const CrossEntropyProblem& problem,
                              at::IntArrayRef loss_sizes);

// A gradient times a number on its device; in its own memory if may_reuse, where a factor of 1 changes nothing.
at::Tensor scale_gradient_cuda(const at::Tensor& grad, const at::Tensor& factor, at::ScalarType dtype, bool may_reuse);

}  // namespace fastopt
