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

inline OptionalTensor optional(const at::Tensor* tensor) { return tensor ? OptionalTensor(*tensor) : std::nullopt; }

// torch's own composite; in_float32: of floating-point arguments converted to float32.
at::Tensor torch_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                               bool in_float32 = false);

at::Tensor call_cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing, bool in_float32);

// Returns the loss and its gradient.
std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool wants_grad,
                                                bool in_float32);

at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& grad, const at::Tensor& input);

// call_keep returns the loss and a keeper that owns the gradient; call_take takes it from there. ignore_index replaces
// that of the arguments, and may be symbolic.
std::tuple<at::Tensor, at::Tensor> call_keep(const CrossEntropyArguments& arguments, c10::SymInt ignore_index);
at::Tensor call_take(const at::Tensor& grad_output, const at::Tensor& keeper, const CrossEntropyArguments& arguments,
                     c10::SymInt ignore_index);

}  // namespace fastopt
