#include "torch/losses/loss_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <utility>  // move

#include "torch/context.h"
#include "torch/losses/scale_gradient.h"

namespace fastopt {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

void LossNode::save_differentiable(const at::Tensor& input, const at::Tensor& gradient) {
  TORCH_INTERNAL_ASSERT(inputs_.size() == gradients_.size(), "inputs that have derivatives are saved first");
  add_next_edge(torch::autograd::impl::gradient_edge(input));
  gradients_.push_back({SavedVariable(gradient, /*is_output=*/false), input.scalar_type()});
  inputs_.emplace_back(input, /*is_output=*/false);
}

void LossNode::save_constant(const at::Tensor& input) { inputs_.emplace_back(input, /*is_output=*/false); }

template <class F>
void LossNode::for_each_saved(F&& f) {
  for (SavedGradient& saved : gradients_) f(saved.gradient);
  for (SavedVariable& input : inputs_) f(input);
}

void LossNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for_each_saved([](SavedVariable& saved) { saved.reset_data(); });
  is_released_ = true;
}

variable_list LossNode::apply(variable_list&& grad_outputs) {
  const at::Tensor& grad_output = grad_outputs[0];
  if (!grad_output.defined()) {
    lock_saved();
    return variable_list(num_outputs());
  }
  if (at::GradMode::is_enabled()) {
    return differentiate_composite(unpacked_inputs(), grad_output, /*create_graph=*/true);
  }
  const bool is_traced = !is_plain_ || backend_of(grad_output) == Backend::kNone || has_dispatch_modes();
  return backward(grad_output, {is_traced, is_forward_mode_on() && grad_output._fw_grad(/*level=*/0).defined()});
}

void LossNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  for (const SavedGradient& saved : gradients_) {
    args.collect(saved.gradient, /*is_output=*/false);
    args.collect(saved.dtype);
  }
  for (const SavedVariable& input : inputs_) args.collect(input, /*is_output=*/false);
  args.collect(is_plain_);
}

variable_list LossNode::apply_with_saved(const variable_list& grad_outputs,
                                         torch::dynamo::autograd::SwapSavedVariables& swapped) {
  for_each_saved([&](SavedVariable& saved) { swapped.before(saved); });
  variable_list gradients = apply(variable_list(grad_outputs));
  for_each_saved([&](SavedVariable& saved) { swapped.after(saved); });
  return gradients;
}

std::unique_lock<std::mutex> LossNode::lock_saved() {
  std::unique_lock<std::mutex> lock(mutex_);
  TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
  return lock;
}

LossNode::Inputs LossNode::unpacked_inputs() {
  const auto lock = lock_saved();
  Inputs inputs;
  for (const SavedVariable& input : inputs_) inputs.push_back(input.unpack());
  return inputs;
}

at::Tensor LossNode::unpacked_input(size_t i) {
  const auto lock = lock_saved();
  return inputs_[i].unpack();
}

at::Tensor LossNode::saved_gradient(size_t i, bool& may_reuse) {
  const auto lock = lock_saved();
  SavedGradient& saved = gradients_[i];
  if (saved.is_moved_out) return {};
  at::Tensor gradient = saved.gradient.unpack();
  may_reuse &= is_last_backward_;
  if (may_reuse) {
    saved.gradient.reset_data();
    saved.is_moved_out = true;
    may_reuse = gradient.use_count() == 1 && gradient.storage().use_count() == 1;
  }
  return gradient;
}

at::Tensor LossNode::scaled(size_t i, const at::Tensor& gradient, const at::Tensor& factor, Mode mode,
                            bool may_reuse) const {
  // Not below autograd, which computes the tangent; and in operators that can be traced.
  if (!mode.is_plain()) return at::mul(gradient, factor.to(gradient.scalar_type())).to(dtype(i));
  at::AutoDispatchBelowADInplaceOrView guard;
  return scale_gradient(gradient, factor, dtype(i), may_reuse);
}

variable_list LossNode::composite_gradients(const at::Tensor& grad_output) {
  at::AutoGradMode enabled(true);
  Inputs inputs = unpacked_inputs();
  for (size_t i = 0; i < num_outputs(); ++i) {
    if (task_should_compute_output(i)) inputs[i] = inputs[i].detach().set_requires_grad(true);
  }
  return differentiate_composite(std::move(inputs), grad_output, /*create_graph=*/false);
}

// Differentiates with respect to aliases of the inputs, whose own hooks then run when the derivatives that are found
// here reach the inputs, and not before.
variable_list LossNode::differentiate_composite(Inputs inputs, const at::Tensor& grad_output, bool create_graph) {
  variable_list wanted, gradients(num_outputs());
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!task_should_compute_output(i)) continue;
    if (inputs[i].requires_grad()) inputs[i] = inputs[i].alias();
    wanted.push_back(inputs[i]);
  }
  if (wanted.empty()) return gradients;
  variable_list found = torch::autograd::grad({composite(inputs)}, wanted, {grad_output},
                                              /*retain_graph=*/create_graph, create_graph);
  for (size_t i = 0, n_found = 0; i < gradients.size(); ++i) {
    if (task_should_compute_output(i)) gradients[i] = std::move(found[n_found++]);
  }
  return gradients;
}

}  // namespace fastopt
