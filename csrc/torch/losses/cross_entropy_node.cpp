#include "torch/losses/cross_entropy_node.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <cmath>  // fabs, isfinite
#include <mutex>
#include <type_traits>  // is_same_v
#include <utility>      // exchange

#include "torch/context.h"
#include "torch/losses/cross_entropy_calls.h"
#include "torch/losses/loss_factor.h"
#include "torch/losses/scale_gradient.h"

namespace fastopt {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// By how much a rounded float16 gradient may still be multiplied, where its logits are gone.
constexpr double kMaxFinalRatio = 16;

// The gradient was computed with the loss. The logits are kept for a second derivative only, and are looked at only
// then: as with torch, they may be overwritten between forward and a plain backward. In place, the gradient is computed
// in the backward, over the logits. That bumps their version counter, so another backward that saved them raises.
//
// The mutex is held while something is unpacked only: what is computed from it may run hooks, and those this backward.
struct CrossEntropyBackward final : torch::autograd::Node {
  SavedVariable grad, keeper, input, target, weight;
  LossGradient computed;  // what is known of `grad`
  LossKind kind;          // of the loss, for its next factor
  at::Tensor totals;      // of the rows, for a gradient in place; undefined where the kernel finds none
  int64_t reduction = 0;
  c10::SymInt ignore_index = 0;
  double label_smoothing = 0;
  bool in_float32 = false;
  bool has_hooks = false;  // for saved tensors: what is saved is asked for as rarely as torch does
  at::ScalarType dtype = at::kFloat;
  bool is_plain = true;           // the forward ran on an ordinary tensor, not on a traced one
  bool is_kept = false;           // the gradient is in the keeper
  bool is_in_place = false;       // the gradient goes over the logits
  bool is_last_backward = false;  // nothing saved is needed after the coming apply

  std::string name() const override { return "CrossEntropyBackward"; }
  void will_release_variables() override { is_last_backward = true; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&grad, &keeper, &input, &target, &weight}) variable->reset_data();
    totals.reset();
    is_released_ = true;
  }

  variable_list apply(variable_list&& grad_outputs) override {
    const at::Tensor& grad_output = grad_outputs[0];
    if (!grad_output.defined()) {
      lock_saved();
      return {at::Tensor()};
    }
    if (at::GradMode::is_enabled()) return {differentiable_backward(grad_output)};

    const bool is_traced = !is_plain || backend_of(grad_output) == Backend::kNone || has_dispatch_modes();
    const bool has_tangent = is_forward_mode_on() && grad_output._fw_grad(/*level=*/0).defined();
    if (is_in_place && !is_traced && !has_tangent) return {backward_in_place(grad_output)};

    if (is_kept) {
      const Arguments saved = unpacked_arguments();
      const at::Tensor holder = unpacked(keeper);
      at::AutoDispatchBelowADInplaceOrView guard;
      return {call_take(grad_output, holder, arguments_of(saved, /*number=*/0), ignore_index)};
    }

    // Unpacked before the guard: a checkpoint recomputes the forward here, and records it.
    bool may_reuse = !is_traced && !has_tangent;
    const auto number = may_reuse ? repeated_number_in(grad_output) : std::nullopt;
    auto [saved, known] = gradient_of_loss(may_reuse, number.has_value());
    at::Tensor logits;  // asked for their dtype; they may have been overwritten
    if (is_traced) {
      logits = saved.scalar_type() != dtype ? unpacked(input) : saved;
    } else {
      check_backed(grad_output, "grad_output");
    }
    // Asked for where it is no number only: a foreseen factor must cost nothing.
    const auto left = [&, known = known] { return known == 1 ? grad_output : at::div(grad_output, known); };
    if (has_tangent) return {at::mul(saved, factor_of(left(), saved)).to(dtype)};  // not below autograd
    at::AutoDispatchBelowADInplaceOrView guard;
    if (is_traced) return {call_backward(left(), saved, logits)};
    if (backend_of(saved) != Backend::kCpu) return {scale_gradient(saved, left(), dtype, may_reuse)};
    record_factor(kind, number, computed, dtype != at::kHalf || computed.is_final || has_logits());
    if (!number) return {scale_gradient(saved, left(), dtype, may_reuse)};
    if (*number != known && !has_hooks && is_predictable(kind)) {
      at::Tensor anew = recomputed_gradient(*number, saved, may_reuse);
      if (anew.defined()) return {scale_gradient(anew, 1.0, dtype, /*may_reuse=*/true)};
      check_final(*number);
    }
    return {scale_gradient(saved, *number / known, dtype, may_reuse)};
  }

  // Compiled autograd: what the node holds, and its backward on what stands for that while a program is traced.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* variable : {&grad, &keeper, &input, &target, &weight})
      args.collect(*variable, /*is_output=*/false);
    args.collect(reduction);
    args.collect(ignore_index);
    args.collect(label_smoothing);
    args.collect(computed.factor);
    args.collect(computed.is_final);
    args.collect(in_float32);
    args.collect(dtype);
    args.collect(is_plain);
    args.collect(is_kept);
    args.collect(is_in_place);
  }
  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (SavedVariable* variable : {&grad, &keeper, &input, &target, &weight}) swapped.before(*variable);
    swapped.before(ignore_index);
    variable_list gradients = apply(variable_list(grad_outputs));
    for (SavedVariable* variable : {&grad, &keeper, &input, &target, &weight}) swapped.after(*variable);
    swapped.after(ignore_index);
    return gradients;
  }

 private:
  // Held while something saved is read. Raises if it has been released.
  std::unique_lock<std::mutex> lock_saved() {
    std::unique_lock<std::mutex> lock(mutex_);
    TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
    return lock;
  }

  at::Tensor unpacked(const SavedVariable& variable) {
    const auto lock = lock_saved();
    return variable.unpack();
  }

  // The arguments as they were saved.
  struct Arguments {
    at::Tensor input, target;
    OptionalTensor weight;
  };
  Arguments unpacked_arguments() {
    const auto lock = lock_saved();
    const at::Tensor weights = weight.unpack();
    return {input.unpack(), target.unpack(), weights.defined() ? OptionalTensor(weights) : std::nullopt};
  }

  CrossEntropyArguments arguments_of(const Arguments& saved, int64_t number) const {
    return {saved.input, saved.target, pointer_to(saved.weight), reduction, number, label_smoothing, in_float32};
  }
  CrossEntropyArguments kernel_arguments(const Arguments& saved) const {
    return arguments_of(saved, ignore_index.expect_int());
  }

  at::Tensor backward_in_place(const at::Tensor& grad_output) {
    const Arguments saved = unpacked_arguments();
    const at::Tensor& logits = saved.input;
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto number = backend_of(logits) == Backend::kCpu ? repeated_number_in(grad_output) : std::nullopt;
    // float16 must be multiplied before it is rounded.
    const auto memory = number || dtype != at::kHalf ? GradientMemory::kLogits : GradientMemory::kFresh;
    auto grad = cross_entropy_kernel(kernel_arguments(saved), memory, {number.value_or(1)}, &totals).second.grad;
    if (!number) grad = scale_gradient(grad, grad_output, grad.scalar_type(), /*may_reuse=*/true);
    if (grad.data_ptr() != logits.data_ptr()) grad = logits.alias().copy_(grad);
    torch::autograd::increment_version(logits);
    return grad;
  }

  // The gradient that was computed with the loss, and its factor; computed again if it is rounded already and the
  // coming factor is no number. may_reuse: whether it may be overwritten or given away; then it must be the last
  // backward, and nobody else must hold it, as a hook for saved tensors can. It is let go of: a hook that fails later
  // leaves this node as it is, and who repeats the backward must not find the gradient changed.
  std::pair<at::Tensor, double> gradient_of_loss(bool& may_reuse, bool is_number) {
    if (!is_in_place && (is_number || !computed.is_final)) {
      const auto lock = lock_saved();
      if (!is_gradient_gone_) {
        at::Tensor saved = grad.unpack();
        may_reuse &= is_last_backward;
        if (may_reuse) {
          grad.reset_data();
          is_gradient_gone_ = true;
          may_reuse = saved.use_count() == 1 && saved.storage().use_count() == 1;
        }
        return {saved, computed.factor};
      }
    }
    const Arguments saved = unpacked_arguments();
    at::AutoDispatchBelowADInplaceOrView guard;
    return {std::get<1>(call_forward(saved.input, saved.target, saved.weight, reduction, ignore_index, label_smoothing,
                                     /*wants_grad=*/true, in_float32)),
            1.0};
  }

  // With another factor; in place of the gradient that was computed, if that may be reused. Undefined if the logits
  // have been overwritten, as they may be.
  at::Tensor recomputed_gradient(double factor, at::Tensor& grad_before, bool may_reuse) {
    Arguments saved;
    try {
      saved = unpacked_arguments();
    } catch (const c10::Error&) {
      return {};
    }
    const CrossEntropyArguments arguments = kernel_arguments(saved);
    if (backend_of(saved.input) != Backend::kCpu || !kernel_takes(arguments)) return {};
    return fastopt::recomputed_gradient(arguments, factor, computed.loss_sum,
                                        may_reuse ? std::move(grad_before) : at::Tensor());
  }

  // A gradient that is rounded already has lost what is small beside its factor.
  void check_final(double factor) const {
    const double ratio = std::fabs(factor / computed.factor);
    TORCH_CHECK(!computed.is_final || ratio <= kMaxFinalRatio || !std::isfinite(ratio),
                "fastopt: the float16 logits of a cross-entropy were changed before its backward, and the gradient was "
                "computed for a factor of ",
                computed.factor, ", which is too far from ", factor);
  }

  // Whether the logits are what they were, as far as autograd can see.
  bool has_logits() {
    if (has_hooks) return false;
    try {
      return unpacked(input).defined();
    } catch (const c10::Error&) {
      return false;
    }
  }

  // Of torch's own composite, so that any further derivative exists. Of an alias of the logits, whose own hooks run
  // when the derivative that is found here reaches them, and not before.
  at::Tensor differentiable_backward(const at::Tensor& grad_output) {
    const Arguments saved = unpacked_arguments();
    const at::Tensor logits = saved.input.requires_grad() ? saved.input.alias() : saved.input;
    const at::Tensor loss =
        torch_cross_entropy(logits, saved.target, saved.weight, reduction, ignore_index, label_smoothing, in_float32);
    return torch::autograd::grad({loss}, {logits}, {grad_output}, /*retain_graph=*/true, /*create_graph=*/true)[0];
  }

  bool is_released_ = false;
  bool is_gradient_gone_ = false;
};

// Nodes are held by std::shared_ptr or by intrusive_ptr, by torch's version.
template <class Pointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<CrossEntropyBackward>(new CrossEntropyBackward(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<CrossEntropyBackward>();
  }
}

}  // namespace

void record_cross_entropy(const at::Tensor& loss, const CrossEntropyArguments& arguments, c10::SymInt ignore_index,
                          SavedForBackward left) {
  auto node = make_node<decltype(torch::autograd::Edge::function)>();
  node->set_next_edges(torch::autograd::collect_next_edges(arguments.input));
  node->grad = SavedVariable(std::exchange(left.gradient.grad, {}), /*is_output=*/false);
  node->computed = left.gradient;
  node->keeper = SavedVariable(left.keeper, false);
  node->is_kept = left.keeper.defined();
  node->input = SavedVariable(arguments.input, false);
  node->target = SavedVariable(arguments.target, false);
  if (arguments.weight) node->weight = SavedVariable(*arguments.weight, false);
  node->reduction = arguments.reduction;
  node->ignore_index = std::move(ignore_index);
  node->label_smoothing = arguments.label_smoothing;
  node->dtype = arguments.input.scalar_type();
  node->in_float32 = arguments.in_float32;
  node->has_hooks = has_saved_tensor_hooks();
  node->is_plain = left.is_plain;
  if (left.is_plain) node->kind = kind_of(arguments);
  node->is_in_place = left.is_in_place;
  node->totals = std::move(left.totals);
  torch::autograd::set_history(loss, node);
}

}  // namespace fastopt
