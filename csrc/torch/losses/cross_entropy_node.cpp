#include "torch/losses/cross_entropy_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/div.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <cmath>    // fabs, isfinite
#include <utility>  // exchange, move

#include "torch/context.h"
#include "torch/losses/cross_entropy_calls.h"
#include "torch/losses/loss_factor.h"
#include "torch/losses/loss_node.h"
#include "torch/losses/scale_gradient.h"

namespace fastopt {
namespace {

// The largest factor by which a rounded float16 gradient may still be multiplied if its logits are gone.
constexpr double kMaxFinalRatio = 16;

// The saved inputs.
constexpr size_t kInput = 0, kTarget = 1, kWeight = 2;

// The gradient was computed with the loss. The logits are saved for a second derivative or another factor only: as with
// torch, they may be overwritten between the forward and a plain backward. In place, the backward computes the gradient
// in the memory of the logits. That bumps their version counter, so another backward that saved them raises.
struct CrossEntropyBackward final : LossNode {
  CrossEntropyOptions options;
  LossGradient computed;     // describes the saved gradient
  LossKind kind;             // of the loss, for the prediction of its next factor
  at::Tensor totals;         // of the rows, for a gradient in place; undefined if the kernel computes none
  bool has_hooks = false;    // for saved tensors: they must not be called more often than torch does
  bool has_keeper = false;   // the saved gradient is a keeper that owns it
  bool is_in_place = false;  // the gradient overwrites the logits

  std::string name() const override { return "CrossEntropyBackward"; }
  void release_variables() override {
    LossNode::release_variables();
    totals.reset();
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    LossNode::compiled_args(args);
    args.collect(options.reduction);
    args.collect(options.ignore_index);
    args.collect(options.label_smoothing);
    args.collect(options.in_float32);
    args.collect(computed.factor);
    args.collect(computed.is_final);
    args.collect(has_keeper);
    args.collect(is_in_place);
  }
  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    swapped.before(options.ignore_index);
    variable_list gradients = LossNode::apply_with_saved(grad_outputs, swapped);
    swapped.after(options.ignore_index);
    return gradients;
  }

 private:
  CrossEntropyArguments arguments_of(const Inputs& inputs) const {
    const at::Tensor& weight = inputs[kWeight];
    return {inputs[kInput], inputs[kTarget], weight.defined() ? &weight : nullptr, options};
  }

  at::Tensor composite(const Inputs& inputs) const override { return torch_cross_entropy(arguments_of(inputs)); }

  variable_list backward(const at::Tensor& grad_output, Mode mode) override {
    if (is_in_place && mode.is_plain()) return {backward_in_place(grad_output)};
    if (has_keeper) {
      const Inputs inputs = unpacked_inputs();
      bool may_reuse = false;
      const at::Tensor keeper = saved_gradient(kInput, may_reuse);
      at::AutoDispatchBelowADInplaceOrView guard;
      return {call_take(grad_output, keeper, arguments_of(inputs))};
    }

    // Unpacked before the guard: a checkpoint computes the forward again here, and records it.
    bool may_reuse = mode.is_plain();
    const auto number = may_reuse ? repeated_number_in(grad_output) : std::nullopt;
    auto [gradient, known] = gradient_of_loss(may_reuse, number.has_value());
    at::Tensor logits;  // only their dtype is used; they may have been overwritten
    if (mode.is_traced) {
      logits = gradient.scalar_type() != dtype(kInput) ? unpacked_input(kInput) : gradient;
    } else {
      check_backed(grad_output, "grad_output");
    }
    // The rest of the factor, by which the gradient is not multiplied yet. Not computed for a number, so that a
    // predicted factor costs nothing.
    const auto rest = [&, known = known] { return known == 1 ? grad_output : at::div(grad_output, known); };
    const auto scaled_by_rest = [&, &gradient = gradient] {
      return scaled(kInput, gradient, along_classes(rest(), gradient), mode, may_reuse);
    };
    if (mode.has_tangent) return {scaled_by_rest()};  // not below autograd
    at::AutoDispatchBelowADInplaceOrView guard;
    if (mode.is_traced) return {call_backward(rest(), gradient, logits)};
    if (backend_of(gradient) != Backend::kCpu) return {scaled_by_rest()};
    record_factor(kind, number, computed, dtype(kInput) != at::kHalf || computed.is_final || has_unchanged_logits());
    if (!number) return {scaled_by_rest()};
    if (*number != known && !has_hooks && is_predictable(kind)) {
      at::Tensor recomputed = recomputed_with(*number, gradient, may_reuse);
      if (recomputed.defined()) return {scale_gradient(recomputed, 1.0, dtype(kInput), /*may_reuse=*/true)};
      check_final(*number);
    }
    return {scale_gradient(gradient, *number / known, dtype(kInput), may_reuse)};
  }

  at::Tensor backward_in_place(const at::Tensor& grad_output) {
    const Inputs inputs = unpacked_inputs();
    const at::Tensor& logits = inputs[kInput];
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto number = backend_of(logits) == Backend::kCpu ? repeated_number_in(grad_output) : std::nullopt;
    // float16 must be multiplied before it is rounded.
    const auto memory = number || dtype(kInput) != at::kHalf ? GradientMemory::kLogits : GradientMemory::kFresh;
    auto grad = cross_entropy_kernel(arguments_of(inputs), memory, {number.value_or(1)}, &totals).second.grad;
    if (!number) {
      grad = scale_gradient(grad, along_classes(grad_output, grad), grad.scalar_type(), /*may_reuse=*/true);
    }
    if (grad.data_ptr() != logits.data_ptr()) grad = logits.alias().copy_(grad);
    torch::autograd::increment_version(logits);
    return grad;
  }

  // The gradient that was computed with the loss, and its factor. It is computed again if it is gone, or if it is
  // already rounded and the coming factor is not a number. may_reuse: see saved_gradient.
  std::pair<at::Tensor, double> gradient_of_loss(bool& may_reuse, bool is_number) {
    if (!is_in_place && (is_number || !computed.is_final)) {
      at::Tensor saved = saved_gradient(kInput, may_reuse);
      if (saved.defined()) return {std::move(saved), computed.factor};
    }
    const Inputs inputs = unpacked_inputs();
    at::AutoDispatchBelowADInplaceOrView guard;
    return {std::get<1>(call_forward(arguments_of(inputs), /*wants_grad=*/true)), 1.0};
  }

  // The gradient computed again with another factor, in the memory of the saved one if that may be reused. Undefined if
  // the logits have been overwritten, as they may be.
  at::Tensor recomputed_with(double factor, at::Tensor& gradient, bool may_reuse) {
    Inputs inputs;
    try {
      inputs = unpacked_inputs();
    } catch (const c10::Error&) {
      return {};
    }
    const CrossEntropyArguments arguments = arguments_of(inputs);
    if (backend_of(arguments.input) != Backend::kCpu || !kernel_takes(arguments)) return {};
    return recomputed_gradient(arguments, factor, computed.loss_sum, may_reuse ? std::move(gradient) : at::Tensor());
  }

  // A rounded gradient has lost digits that are small beside its factor.
  void check_final(double factor) const {
    const double ratio = std::fabs(factor / computed.factor);
    TORCH_CHECK(!computed.is_final || ratio <= kMaxFinalRatio || !std::isfinite(ratio),
                "fastopt: the float16 logits of a cross-entropy were changed before its backward, and the gradient was "
                "computed for a factor of ",
                computed.factor, ", which is too far from ", factor);
  }

  // True if the logits have not been changed, as far as autograd can tell.
  bool has_unchanged_logits() {
    if (has_hooks) return false;
    try {
      return unpacked_input(kInput).defined();
    } catch (const c10::Error&) {
      return false;
    }
  }
};

}  // namespace

void record_cross_entropy(const at::Tensor& loss, const CrossEntropyArguments& arguments, SavedForBackward saved) {
  auto node = make_loss_node<CrossEntropyBackward>();
  node->has_keeper = saved.keeper.defined();
  node->save_differentiable(arguments.input, node->has_keeper ? saved.keeper : std::exchange(saved.gradient.grad, {}));
  node->save_constant(arguments.target);
  node->save_constant(arguments.weight ? *arguments.weight : at::Tensor());
  node->computed = saved.gradient;
  node->options = arguments.options;
  node->has_hooks = has_saved_tensor_hooks();
  node->set_plain(saved.is_plain);
  if (saved.is_plain) node->kind = kind_of(arguments);
  node->is_in_place = saved.is_in_place;
  node->totals = std::move(saved.totals);
  torch::autograd::set_history(loss, node);
}

}  // namespace fastopt
