// A gradient that is computed with a loss and handed on in its backward, in a program that torch.compile has made: as
// an array between two operators it could not be, for an operator may not return what it was given, and a copy would
// cost as much as the loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/cross_entropy_kernel.h"

namespace fastopt {

// A tensor of one byte that holds a gradient in its memory's context. What copies the byte does not copy the gradient.
at::Tensor keep_gradient(LossGradient gradient);

// The gradient, which the tensor then holds no longer; nothing if it holds none.
std::optional<LossGradient> take_gradient(const at::Tensor& keeper);

}  // namespace fastopt
