// A pointwise loss of the list as a value, and a call of one.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "losses/pointwise.h"

namespace fastopt {

struct PointwiseDescription {
  int place;         // in the list
  std::string name;  // in torch.nn.functional, and of torch's operator
  int n_inputs, n_derivatives;
  bool saves_derivatives;
  std::vector<std::string> numbers;
  std::string node_name;      // "MseLossBackward"
  std::string profiled_name;  // "fastopt::mse_loss"
};

const std::vector<PointwiseDescription>& pointwise_losses();
// Raises if there is none of that name.
const PointwiseDescription* find_pointwise_loss(std::string_view name);

// Calls of a loss that have reached a kernel.
std::atomic<int64_t>& pointwise_calls(int place);

using PointwiseInputs = c10::SmallVector<at::Tensor, 4>;

struct PointwiseOptions {
  const PointwiseDescription* loss;
  int64_t reduction = at::Reduction::Mean;
  std::array<double, kMaxLossNumbers> numbers{};
};

// True if the kernels take these tensors: ordinary ones on the CPU, of one dtype, of equal sizes, dense, and with their
// elements in the same order.
bool pointwise_kernel_takes(const PointwiseDescription& loss, const PointwiseInputs& inputs);

using PointwiseGradients = std::array<at::Tensor, kMaxLossInputs>;

// The number by which the derivatives of each element are multiplied, for a loss gradient of 1.
double gradient_scale(const PointwiseOptions& options, int64_t n);

// The loss, and the gradients that are wanted: derivatives times grad_scale. `wanted` has a bit for each input.
at::Tensor pointwise_forward(const PointwiseOptions& options, const PointwiseInputs& inputs, unsigned wanted,
                             double grad_scale, PointwiseGradients& gradients);

// The gradients that are wanted.
PointwiseGradients pointwise_backward(const PointwiseOptions& options, const PointwiseInputs& inputs, unsigned wanted,
                                      const at::Tensor& grad_output);

// torch's own operator, differentiable.
at::Tensor torch_pointwise(const PointwiseOptions& options, const PointwiseInputs& inputs);

// Makes loss a function of the inputs that require grad. Gradients may be undefined: then the backward computes them.
// are_derivatives: they have not been multiplied by gradient_scale() yet.
void record_pointwise(const at::Tensor& loss, const PointwiseOptions& options, const PointwiseInputs& inputs,
                      const PointwiseGradients& gradients, bool are_derivatives);

}  // namespace fastopt
