// Multiplies the gradient that was computed with a loss by the loss's own gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// The loss's own gradient so that it multiplies that of the logits, whose type it takes.
at::Tensor factor_of(const at::Tensor& grad_output, const at::Tensor& grad);

// grad times grad_output, a number or one for each position, in the dtype of the logits. may_reuse: the memory of
// `grad`, which nobody else holds, may be that of the result.
at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& grad_output, at::ScalarType dtype, bool may_reuse);

// The same of a number.
at::Tensor scale_gradient(const at::Tensor& grad, double factor, at::ScalarType dtype, bool may_reuse);

}  // namespace fastopt
