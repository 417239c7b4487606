// In programs that torch.compile makes: a gradient that is computed with the loss and returned by its backward without
// a copy, which would cost as much as the loss. As a tensor that one operator passes to another it would have to be
// copied, since an operator may not return its argument.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/losses/cross_entropy_kernel.h"

namespace fastopt {

// A tensor of one byte whose memory owns a gradient. A copy of the tensor does not own it.
at::Tensor keep_gradient(LossGradient gradient);

// Moves the gradient out of the tensor; nothing if the tensor owns none.
std::optional<LossGradient> take_gradient(const at::Tensor& keeper);

}  // namespace fastopt
