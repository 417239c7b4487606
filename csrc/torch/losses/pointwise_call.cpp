#include "torch/losses/pointwise_call.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/jit_type.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>  // find
#include <cctype>     // toupper

#include "cpu/pointwise.h"
#include "losses/pointwise_losses.h"
#include "torch/context.h"
#include "torch/large_arrays.h"
#include "torch/losses/logit_layout.h"

namespace fastopt {
namespace {

// "MseLossBackward" of "mse_loss".
std::string node_name(std::string_view name) {
  std::string result;
  bool is_start = true;
  for (const char c : name) {
    if (c != '_') result += is_start ? static_cast<char>(std::toupper(c)) : c;
    is_start = c == '_';
  }
  return result + "Backward";
}

template <int kLoss>
PointwiseDescription describe() {
  using Loss = PointwiseLossAt<kLoss>;
  static_assert(Loss::kInputs <= kMaxLossInputs && Loss::kNumberCount <= kMaxLossNumbers, "a loss must fit");
  static_assert(Loss::kNumberCount == 0 || sizeof(Loss) == Loss::kNumberCount * sizeof(double),
                "a loss is its numbers");
  return {kLoss,
          Loss::kName,
          Loss::kInputs,
          Loss::kDerivatives,
          Loss::kSavesDerivatives,
          split_names(Loss::kNumbers),
          node_name(Loss::kName),
          std::string("fastopt::") + Loss::kName};
}

// True if both are dense and have their elements in the same order.
bool have_same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  return a.strides() == b.strides() && a.is_non_overlapping_and_dense();
}

// Strides of dense memory with elements in the order of a tensor's.
c10::SmallVector<int64_t, 6> dense_strides(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return strides_if_contiguous(tensor.sizes());
  return {tensor.strides().begin(), tensor.strides().end()};
}

at::Tensor empty_like_input(const at::Tensor& input) {
  return at::empty_strided(input.sizes(), dense_strides(input), input.options().requires_grad(false));
}

PointwiseProblem problem_of(const PointwiseOptions& options, const PointwiseInputs& inputs) {
  PointwiseProblem problem{};
  problem.loss = options.loss->place;
  std::copy(options.numbers.begin(), options.numbers.end(), problem.numbers);
  problem.dtype = *dtype_of(inputs[0]);
  problem.n = inputs[0].numel();
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_backed(inputs[i], i == 0 ? "input" : "target");
    problem.inputs[i] = inputs[i].const_data_ptr();
  }
  return problem;
}

void allocate_gradients(const PointwiseInputs& inputs, unsigned wanted, PointwiseGradients& gradients,
                        PointwiseProblem& problem) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!(wanted >> i & 1)) continue;
    gradients[i] = empty_large(inputs[i].sizes(), dense_strides(inputs[i]), inputs[i].scalar_type());
    problem.gradients[i] = gradients[i].mutable_data_ptr();
  }
}

// Keeps the memory alive: another thread may give a tensor other memory while the kernel runs.
c10::SmallVector<c10::Storage, kMaxLossInputs> storages_of(const PointwiseInputs& inputs) {
  c10::SmallVector<c10::Storage, kMaxLossInputs> storages;
  for (const at::Tensor& input : inputs) storages.push_back(input.storage());
  return storages;
}

double run(const PointwiseProblem& problem) {
  ++pointwise_calls(problem.loss);
  return cpu::pointwise(problem, torch_threads());
}

}  // namespace

const std::vector<PointwiseDescription>& pointwise_losses() {
  static const auto* losses = []<int... kLosses>(std::integer_sequence<int, kLosses...>) {
    return new std::vector<PointwiseDescription>{describe<kLosses>()...};
  }(std::make_integer_sequence<int, kPointwiseLosses>{});
  return *losses;
}

const PointwiseDescription* find_pointwise_loss(std::string_view name) {
  for (const PointwiseDescription& loss : pointwise_losses()) {
    if (loss.name == name) return &loss;
  }
  TORCH_CHECK_VALUE(false, "fastopt has no pointwise loss of the name ", name);
}

std::atomic<int64_t>& pointwise_calls(int place) {
  static std::array<std::atomic<int64_t>, kPointwiseLosses> calls{};
  return calls[place];
}

bool pointwise_kernel_takes(const PointwiseDescription& loss, const PointwiseInputs& inputs) {
  if (static_cast<int>(inputs.size()) != loss.n_inputs) return false;
  const at::Tensor& first = inputs[0];
  if (!dtype_of(first) || first.numel() == 0) return false;
  for (const at::Tensor& input : inputs) {
    if (!input.defined() || backend_of(input) != Backend::kCpu || input.scalar_type() != first.scalar_type() ||
        input.sizes() != first.sizes() || !have_same_order(input, first)) {
      return false;
    }
  }
  return true;
}

double gradient_scale(const PointwiseOptions& options, int64_t n) {
  return options.reduction == at::Reduction::Mean ? 1 / static_cast<double>(n) : 1;
}

at::Tensor pointwise_forward(const PointwiseOptions& options, const PointwiseInputs& inputs, unsigned wanted,
                             double grad_scale, PointwiseGradients& gradients) {
  const auto held = storages_of(inputs);
  PointwiseProblem problem = problem_of(options, inputs);
  const bool is_mean = options.reduction == at::Reduction::Mean;
  problem.wants_sum = options.reduction != at::Reduction::None;
  problem.grad_scale = grad_scale;
  allocate_gradients(inputs, wanted, gradients, problem);
  if (!problem.wants_sum) {
    // Not from the block that is kept: that is for the gradient.
    at::Tensor losses = empty_like_input(inputs[0]);
    problem.losses = losses.mutable_data_ptr();
    run(problem);
    return losses;
  }
  const double sum = run(problem);
  at::Tensor loss = at::empty({}, inputs[0].options().requires_grad(false));
  with_stored_type(problem.dtype, [&](auto stored) {
    using S = decltype(stored);
    const double value = is_mean ? sum / static_cast<double>(problem.n) : sum;
    store(*static_cast<S*>(loss.mutable_data_ptr()), static_cast<compute_t<S>>(value));
  });
  return loss;
}

PointwiseGradients pointwise_backward(const PointwiseOptions& options, const PointwiseInputs& inputs, unsigned wanted,
                                      const at::Tensor& grad_output) {
  PointwiseGradients gradients;
  const auto held = storages_of(inputs);
  PointwiseProblem problem = problem_of(options, inputs);
  problem.grad_scale = gradient_scale(options, problem.n);
  at::Tensor factors;
  if (const auto number = repeated_number_in(grad_output)) {
    problem.grad_scale *= *number;
  } else {
    factors = grad_output;
    if (!have_same_order(factors, inputs[0])) factors = empty_like_input(inputs[0]).copy_(grad_output);
    problem.grad_outputs = factors.const_data_ptr();
  }
  allocate_gradients(inputs, wanted, gradients, problem);
  run(problem);
  return gradients;
}

at::Tensor torch_pointwise(const PointwiseOptions& options, const PointwiseInputs& inputs) {
  const PointwiseDescription& loss = *options.loss;
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("aten::" + loss.name).c_str(), "");
  torch::jit::Stack stack;
  auto input = inputs.begin();
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto number = std::find(loss.numbers.begin(), loss.numbers.end(), argument.name());
    if (argument.name() == "reduction") {
      stack.emplace_back(options.reduction);
    } else if (number != loss.numbers.end()) {
      const double value = options.numbers[number - loss.numbers.begin()];
      stack.emplace_back(argument.type()->kind() == c10::TypeKind::BoolType ? c10::IValue(value != 0) : value);
    } else {
      TORCH_INTERNAL_ASSERT(input != inputs.end(), "the schema of ", loss.name);
      stack.emplace_back(input->defined() ? c10::IValue(*input) : c10::IValue());
      ++input;
    }
  }
  op.callBoxed(stack);
  return stack.back().toTensor();
}

}  // namespace fastopt
