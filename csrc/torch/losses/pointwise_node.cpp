// The autograd node of pointwise losses.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <algorithm>  // copy_n, min
#include <utility>    // move

#include "torch/context.h"
#include "torch/losses/loss_node.h"
#include "torch/losses/pointwise_call.h"

namespace fastopt {
namespace {

using torch::autograd::variable_list;

// The backward in a program that compiled autograd makes, as an operator: the gradients of the inputs at the places
// `wanted`.
variable_list gradients_kernel(const at::Tensor& grad_output, at::TensorList inputs, c10::string_view loss,
                               int64_t reduction, at::ArrayRef<double> numbers, at::IntArrayRef wanted) {
  PointwiseOptions options{find_pointwise_loss(loss), reduction};
  std::copy_n(numbers.begin(), std::min(numbers.size(), options.numbers.size()), options.numbers.begin());
  const PointwiseInputs all(inputs.begin(), inputs.end());
  TORCH_CHECK(pointwise_kernel_takes(*options.loss, all), "fastopt::_pointwise_gradients: no kernel takes the inputs");
  unsigned bits = 0;
  for (const int64_t i : wanted) {
    TORCH_CHECK(0 <= i && i < options.loss->n_derivatives, "fastopt::_pointwise_gradients: no input ", i);
    bits |= 1u << i;
  }
  PointwiseGradients found = pointwise_backward(options, all, bits, grad_output);
  variable_list gradients;
  for (const int64_t i : wanted) gradients.push_back(std::move(found[i]));
  return gradients;
}

variable_list gradients_fake(const at::Tensor& /*grad_output*/, at::TensorList inputs, c10::string_view /*loss*/,
                             int64_t /*reduction*/, at::ArrayRef<double> /*numbers*/, at::IntArrayRef wanted) {
  variable_list gradients;
  for (const int64_t i : wanted) gradients.push_back(at::empty_like(inputs[i]));
  return gradients;
}

// Gradients that were computed with the loss are returned, or multiplied by the loss's own gradient; otherwise they are
// computed from the inputs here. The inputs must not have been changed in place, in either case, if that is so with
// torch.
struct PointwiseBackward final : LossNode {
  PointwiseOptions options{};
  bool has_gradients = false;    // which were computed with the loss
  bool are_derivatives = false;  // which are not multiplied by gradient_scale() yet
  bool is_compiled = false;      // compiled autograd is tracing

  std::string name() const override { return options.loss->node_name; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    LossNode::compiled_args(args);
    args.collect(options.loss->name);
    args.collect(options.reduction);
    for (const double number : options.numbers) args.collect(number);
  }
  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    is_compiled = true;
    const auto end = c10::make_scope_exit([this] { is_compiled = false; });
    return LossNode::apply_with_saved(grad_outputs, swapped);
  }

 private:
  at::Tensor composite(const Inputs& inputs) const override { return torch_pointwise(options, inputs); }

  variable_list backward(const at::Tensor& grad_output, Mode mode) override {
    if (is_compiled) return call_gradients(grad_output, unpacked_inputs());
    const Inputs inputs = inputs_if_needed();
    if (!inputs.empty() && (!mode.is_plain() || !pointwise_kernel_takes(*options.loss, inputs))) {
      return composite_gradients(grad_output);
    }
    check_backed(grad_output, "grad_output");
    variable_list gradients(num_outputs());
    unsigned wanted = 0;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      bool may_reuse = mode.is_plain();
      const at::Tensor saved = has_gradients ? saved_gradient(i, may_reuse) : at::Tensor();
      // A gradient of 16 bits must be multiplied before it is rounded.
      const bool is_exact = are_derivatives || dtype(i) == at::kFloat || dtype(i) == at::kDouble ||
                            number_in(grad_output) == 1.0 || inputs.empty();
      if (saved.defined() && is_exact) {
        const double scale = are_derivatives ? gradient_scale(options, saved.numel()) : 1;
        const at::Tensor factor = scale == 1 ? grad_output : at::mul(grad_output.to(at::kDouble), scale);
        gradients[i] = scaled(i, saved, factor, mode, may_reuse);
      } else {
        wanted |= 1u << i;
      }
    }
    if (wanted != 0 && inputs.empty()) unpacked_inputs();  // raises again
    if (wanted != 0) {
      at::AutoDispatchBelowADInplaceOrView guard;
      PointwiseGradients found = pointwise_backward(options, inputs, wanted, grad_output);
      for (size_t i = 0; i < gradients.size(); ++i) {
        if (wanted >> i & 1) gradients[i] = std::move(found[i]);
      }
    }
    return gradients;
  }

  // The inputs; none if they have been changed in place and the derivatives are there.
  Inputs inputs_if_needed() {
    try {
      return unpacked_inputs();
    } catch (const c10::Error&) {
      if (!options.loss->saves_derivatives || !has_gradients) throw;
      return {};
    }
  }

  variable_list call_gradients(const at::Tensor& grad_output, const Inputs& inputs) {
    std::vector<int64_t> wanted;
    variable_list gradients(num_outputs());
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (task_should_compute_output(i)) wanted.push_back(static_cast<int64_t>(i));
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastopt::_pointwise_gradients", "")
                               .typed<decltype(gradients_kernel)>();
    variable_list found = op.call(grad_output, inputs, options.loss->name, options.reduction, options.numbers, wanted);
    for (size_t i = 0; i < wanted.size(); ++i) gradients[wanted[i]] = std::move(found[i]);
    return gradients;
  }
};

TORCH_LIBRARY_FRAGMENT(fastopt, library) {
  library.def(
      "_pointwise_gradients(Tensor grad_output, Tensor[] inputs, str loss, int reduction, float[] numbers, "
      "int[] wanted) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(fastopt, CPU, library) { library.impl("_pointwise_gradients", gradients_kernel); }
TORCH_LIBRARY_IMPL(fastopt, Meta, library) { library.impl("_pointwise_gradients", gradients_fake); }

}  // namespace

void record_pointwise(const at::Tensor& loss, const PointwiseOptions& options, const PointwiseInputs& inputs,
                      const PointwiseGradients& gradients, bool are_derivatives) {
  auto node = make_loss_node<PointwiseBackward>();
  node->options = options;
  node->are_derivatives = are_derivatives;
  for (int i = 0; i < options.loss->n_inputs; ++i) {
    if (i < options.loss->n_derivatives) {
      node->save_differentiable(inputs[i], gradients[i]);
      node->has_gradients |= gradients[i].defined();
    } else {
      node->save_constant(inputs[i]);
    }
  }
  torch::autograd::set_history(loss, node);
}

}  // namespace fastopt
