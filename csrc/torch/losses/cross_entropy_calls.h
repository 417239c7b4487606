// Calls of cross-entropy that go through the dispatcher: torch's own, and the operators of this library.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "torch/losses/cross_entropy_kernel.h"

namespace fastopt {

using OptionalTensor = std::optional<at::Tensor>;

inline const at::Tensor* pointer_to(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

// torch's own composite, of floating-point arguments converted to float32 if the options say so.
at::Tensor torch_cross_entropy(const CrossEntropyArguments& arguments);

at::Tensor call_cross_entropy(const CrossEntropyArguments& arguments);

// Returns the loss and its gradient.
std::tuple<at::Tensor, at::Tensor> call_forward(const CrossEntropyArguments& arguments, bool wants_grad);
at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input);

// call_keep returns the loss and a keeper that owns the gradient; call_take takes it from there.
std::tuple<at::Tensor, at::Tensor> call_keep(const CrossEntropyArguments& arguments);
at::Tensor call_take(const at::Tensor& grad_output, const at::Tensor& keeper, const CrossEntropyArguments& arguments);

}  // namespace fastopt
