// Multiplies the gradient that was computed with a loss by the loss's own gradient, and rounds it once.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastopt {

// grad times a factor that broadcasts against it, in the dtype of the input. may_reuse: the result may take the
// memory of `grad`, which nothing else references.
at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& factor, at::ScalarType dtype, bool may_reuse);

// The same with a number.
at::Tensor scale_gradient(const at::Tensor& grad, double factor, at::ScalarType dtype, bool may_reuse);

}  // namespace fastopt
