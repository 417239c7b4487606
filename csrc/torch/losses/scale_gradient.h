// Multiplies the gradient that was computed with a loss by the loss's own gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// grad_output in the type of grad and in a shape that broadcasts against it.
at::Tensor factor_of(const at::Tensor& grad_output, const at::Tensor& grad);

// grad times grad_output, a number or one for each position, in the dtype of the logits. may_reuse: the result may take
// the memory of `grad`, which nothing else references.
at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& grad_output, at::ScalarType dtype, bool may_reuse);

// The same with a number.
at::Tensor scale_gradient(const at::Tensor& grad, double factor, at::ScalarType dtype, bool may_reuse);

}  // namespace fastopt
