#include "torch/losses/cross_entropy_kernel.h"

#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/eq.h>

#include <cmath>        // fabs
#include <limits>       // numeric_limits
#include <type_traits>  // conditional_t

#include "cpu/cross_entropy/solve.h"
#include "cpu/cross_entropy/targets.h"
#include "torch/context.h"
#include "torch/cuda_library.h"
#include "torch/large_arrays.h"
#include "torch/losses/logit_layout.h"

namespace fastopt {
namespace {

// Uninitialised memory of the size of the logits.
at::Tensor empty_like_logits(const at::Tensor& logits, at::IntArrayRef strides, at::ScalarType dtype) {
  if (logits.is_cpu()) return empty_large(logits.sizes(), strides, dtype);
  return at::empty_strided(logits.sizes(), strides, logits.options().requires_grad(false).dtype(dtype));
}

bool is_16_bit(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

bool is_dense(const at::Tensor& tensor) { return tensor.is_contiguous() || tensor.is_non_overlapping_and_dense(); }

// A problem, and the tensors whose memory it points to.
struct PreparedProblem {
  CrossEntropyProblem problem{};
  at::Tensor input, grad, target, weight;
  c10::SmallVector<int64_t, 6> strides;  // of a dense array like the logits
  LogitLayout dense_layout;              // by these strides
};

// The gradient has the strides of the logits. Logits whose strides a kernel does not support are copied once.
void prepare_logits(const CrossEntropyArguments& a, PreparedProblem& prepared) {
  at::Tensor& input = prepared.input;
  input = a.input;
  auto layout = layout_of(input);
  auto strides = strides_if_contiguous(input.sizes());
  if (is_dense(input)) strides.assign(input.strides().begin(), input.strides().end());
  auto dense_layout = layout_of(input.sizes(), strides);
  if (!layout || !dense_layout || !same_kind(*layout, *dense_layout)) {
    input = input.contiguous();
    strides = strides_if_contiguous(input.sizes());
    layout = dense_layout = layout_of(input);
  }
  prepared.strides = strides;
  prepared.dense_layout = *dense_layout;
  prepared.problem.dtype = *dtype_of(input);
  prepared.problem.logits_layout = *layout;
  prepared.problem.logits = input.const_data_ptr();
}

void prepare_gradient(const CrossEntropyArguments& a, GradientMemory memory, bool is_factor_known, at::Tensor into,
                      PreparedProblem& prepared) {
  CrossEntropyProblem& problem = prepared.problem;
  const at::Tensor& input = prepared.input;
  at::Tensor& grad = prepared.grad;
  const bool is_half = input.scalar_type() == at::kHalf;
  const bool is_cuda = backend_of(a.input) == Backend::kCuda;
  if (memory == GradientMemory::kLogits && input.is_same(a.input) && !(is_half && is_cuda)) {
    grad = input.alias();
    problem.grad_layout = problem.logits_layout;
    problem.is_grad_final = is_half;
  } else if (memory != GradientMemory::kNone) {
    problem.is_grad_final = is_half && !is_cuda && is_factor_known;
    const auto dtype = is_half && !problem.is_grad_final ? at::kFloat : input.scalar_type();
    const bool is_given = into.defined() && into.scalar_type() == dtype && into.sizes() == input.sizes() &&
                          into.strides() == at::IntArrayRef(prepared.strides);
    if (is_given) {
      grad = std::move(into);
    } else {
      into.reset();
      grad = empty_like_logits(input, prepared.strides, dtype);
    }
    problem.grad_layout = prepared.dense_layout;
  }
  if (grad.defined()) problem.grad = grad.mutable_data_ptr();
}

// The target, in the order of the positions.
void prepare_target(const CrossEntropyArguments& a, PreparedProblem& prepared) {
  CrossEntropyProblem& problem = prepared.problem;
  at::Tensor& target = prepared.target;
  target = a.target;
  if (target.scalar_type() == at::kLong) {
    if (!target.is_contiguous()) target = target.contiguous();
    problem.target = target.const_data_ptr<int64_t>();
    problem.ignore_index = a.options.ignore_index.expect_int();
  } else {
    problem.probabilities_layout = prepared.dense_layout;
    const auto layout = layout_of(target);
    if (layout && same_kind(*layout, problem.logits_layout)) {
      problem.probabilities_layout = *layout;
    } else {
      target = empty_like_logits(prepared.input, prepared.strides, prepared.input.scalar_type()).copy_(a.target);
    }
    problem.probabilities = target.const_data_ptr();
  }
}

void prepare_weight(const CrossEntropyArguments& a, PreparedProblem& prepared) {
  CrossEntropyProblem& problem = prepared.problem;
  problem.weight_sum = static_cast<double>(problem.logits_layout.n_classes);
  if (!a.weight) return;
  const auto compute_type = problem.dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
  at::Tensor& weight = prepared.weight;
  weight = a.weight->is_contiguous() ? *a.weight : a.weight->contiguous();
  if (weight.scalar_type() != compute_type) weight = weight.to(compute_type);
  problem.weight = weight.const_data_ptr();
}

at::Tensor empty_loss(const CrossEntropyArguments& a, const at::TensorOptions& options) {
  if (a.options.reduction != at::Reduction::None) return at::empty({}, options);
  return at::empty(positions_of(a.input.sizes(), a.input.strides()).sizes, options);
}

// Launches the problem on the device of its tensors and returns the loss without waiting. A target that is not a class
// makes its loss and its row of the gradient NaN.
at::Tensor solve_on_cuda(const CrossEntropyArguments& a, const CrossEntropyProblem& problem) {
  const CudaDevice device(a.input.device());
  cuda::CrossEntropy call{};
  call.problem = problem;
  call.reduction = a.options.reduction == at::Reduction::None   ? cuda::Reduction::kNone
                   : a.options.reduction == at::Reduction::Mean ? cuda::Reduction::kMean
                                                                : cuda::Reduction::kSum;
  const auto options = a.input.options().requires_grad(false);
  const bool is_reduced = call.reduction != cuda::Reduction::kNone;
  const at::Tensor loss = empty_loss(a, options);
  (is_reduced ? call.loss : call.problem.losses) = loss.mutable_data_ptr();
  const LogitLayout& layout = problem.logits_layout;
  const auto what = [&] {
    return c10::str("cross-entropy of ", layout.n_outer * layout.n_inner, " positions and ", layout.n_classes,
                    " classes");
  };
  int64_t bytes = 0;
  int error = cuda_library().workspace_bytes(call, &bytes);
  if (error != 0) check_cuda(error, what(), a.input.device());
  const at::Tensor workspace = bytes > 0 ? at::empty({bytes}, options.dtype(at::kByte)) : at::Tensor();
  if (bytes > 0) call.workspace = workspace.mutable_data_ptr();
  error = cuda_library().cross_entropy(call, device.stream());
  if (error != 0) check_cuda(error, what(), a.input.device());
  // torch's mean over the one target of logits without a batch is 0 on CUDA if that is ignored; on the CPU it is NaN.
  const bool is_unbatched = a.input.dim() == 1 && problem.target && a.options.label_smoothing == 0;
  if (a.input.is_cuda() && is_unbatched && call.reduction == cuda::Reduction::kMean) {
    loss.masked_fill_(a.target.eq(a.options.ignore_index.expect_int()), 0);
  }
  count_cross_entropy();
  ++kernel_calls().cuda;
  return loss;
}

std::pair<at::Tensor, LossGradient> solve_on_cpu(const CrossEntropyArguments& a, PreparedProblem& prepared,
                                                 LossFactor given_factor, at::Tensor* totals) {
  CrossEntropyProblem& problem = prepared.problem;
  const LogitLayout& layout = problem.logits_layout;
  const bool is_smoothed = a.options.label_smoothing != 0;
  // Not summed otherwise: a weight that is not finite would affect every row.
  if (problem.weight && problem.target && is_smoothed) problem.weight_sum = cpu::sum_weights(problem);

  // All targets are checked before one is used; their tally gives the mean's denominator.
  const cpu::Threads threads = torch_threads();
  const int64_t n_positions = layout.n_outer * layout.n_inner;
  double denominator = static_cast<double>(n_positions);
  if (problem.target) {
    const cpu::TargetTally tally = cpu::tally_targets(problem, threads);
    TORCH_CHECK_INDEX(tally.is_valid, "Target ", tally.bad_target, " is out of bounds.");
    denominator = tally.weight_sum;
  }
  // 0 / 0, whatever is smoothed over other classes.
  if (denominator == 0) denominator = std::numeric_limits<double>::quiet_NaN();
  auto options = a.input.options().requires_grad(false);
  if (a.options.in_float32) options = options.dtype(at::kFloat);
  const double factor = given_factor.of(denominator, c10::typeMetaToScalarType(options.dtype()));
  problem.grad_scale = a.options.reduction == at::Reduction::Mean ? factor / denominator : factor;
  if (totals && !problem.grad && cpu::uses_totals(layout, problem.dtype)) {
    *totals = at::empty({n_positions, sizeof(RowTotals)}, options.dtype(at::kByte));
  }
  if (totals && totals->defined()) problem.totals = static_cast<RowTotals*>(totals->mutable_data_ptr());

  at::Tensor loss;
  const bool is_known = problem.grad && problem.totals;
  const bool is_reduced = a.options.reduction != at::Reduction::None;
  if (!is_known) loss = empty_loss(a, options);
  if (!is_known && !is_reduced) problem.losses = loss.mutable_data_ptr();
  double sum = 0;
  TORCH_CHECK_INDEX(cpu::cross_entropy(problem, threads, &sum),
                    "A target was changed to one that is out of bounds while the loss was computed.");
  if (!is_known && is_reduced) {
    const double value = a.options.reduction == at::Reduction::Mean ? sum / denominator : sum;
    with_stored_type(a.options.in_float32 ? DType::kFloat32 : problem.dtype, [&](auto stored) {
      using L = decltype(stored);
      store(*static_cast<L*>(loss.mutable_data_ptr()), static_cast<compute_t<L>>(value));
    });
  }
  count_cross_entropy();
  return {loss, {std::move(prepared.grad), factor, denominator, sum, problem.is_grad_final}};
}

}  // namespace

bool fits_kernel(const CrossEntropyArguments& a) {
  const at::Tensor& input = a.input;
  const at::Tensor& target = a.target;
  const bool has_device = input.device().is_cpu() || (input.device().is_cuda() && cuda_service().takes_cuda);
  if (!has_device || target.device() != input.device() || !dtype_of(input)) return false;
  if (input.dim() < 1 || input.sym_numel() == 0 || a.options.reduction < 0 || a.options.reduction > 2) return false;
  if (!(a.options.label_smoothing >= 0 && a.options.label_smoothing <= 1)) return false;
  // A gradient in 16 bits may be multiplied by a number, not by a float32 number of each position: see scale_gradient.
  if (a.options.in_float32 &&
      (!is_16_bit(input) || !is_for_cpu_kernels(input) || a.options.reduction == at::Reduction::None))
    return false;
  const int64_t dim = class_dim(input.dim());
  if (a.weight) {
    const at::Tensor& weight = *a.weight;
    const bool has_type = weight.scalar_type() == input.scalar_type() ||
                          (a.options.in_float32 && (is_16_bit(weight) || weight.scalar_type() == at::kFloat));
    if (weight.device() != input.device() || !has_type || weight.requires_grad()) return false;
    if (weight.dim() != 1 || weight.sym_size(0) != input.sym_size(dim)) return false;
  }
  const bool has_indices = target.scalar_type() == at::kLong;
  if (!has_indices && (target.scalar_type() != input.scalar_type() || target.requires_grad() ||
                       a.options.ignore_index.maybe_as_int().value_or(-1) >= 0)) {
    return false;
  }
  if (target.dim() != (has_indices ? input.dim() - 1 : input.dim())) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.sym_size(d) != input.sym_size(has_indices && d >= dim ? d + 1 : d)) return false;
  }
  return true;
}

bool kernel_takes(const CrossEntropyArguments& a) {
  const Backend backend = backend_of(a.input);
  return backend != Backend::kNone && backend_of(a.target) == backend &&
         (!a.weight || backend_of(*a.weight) == backend) && fits_kernel(a);
}

at::Tensor along_classes(const at::Tensor& grad_output, const at::Tensor& grad) {
  if (grad.dim() == 1) return grad_output.unsqueeze(0);
  return grad_output.dim() > 0 ? grad_output.unsqueeze(1) : grad_output;
}

double LossFactor::of(double denominator, at::ScalarType loss_dtype) const {
  if (!is_mean) return number;
  const double exact = 1 / denominator;
  if (!(std::fabs(exact) >= kMinLossFactor)) return 1;
  if (loss_dtype == at::kDouble) return exact;
  const auto single = static_cast<float>(exact);
  if (loss_dtype == at::kBFloat16) return static_cast<float>(c10::BFloat16(single));
  if (loss_dtype == at::kHalf) return static_cast<float>(c10::Half(single));
  return single;
}

std::pair<at::Tensor, LossGradient> cross_entropy_kernel(const CrossEntropyArguments& a, GradientMemory memory,
                                                         LossFactor factor, at::Tensor* totals, at::Tensor into) {
  TORCH_CHECK(kernel_takes(a), "fastopt::cross_entropy_forward: shapes, dtypes or devices do not fit a kernel");
  check_backed(a.input, "input");
  check_backed(a.target, "target");
  if (a.weight) check_backed(*a.weight, "weight");
  // Keeps the memory alive: another thread may give a tensor other memory while the kernel runs.
  const c10::Storage held[] = {a.input.storage(), a.target.storage(), a.weight ? a.weight->storage() : c10::Storage()};
  PreparedProblem prepared;
  prepared.problem.label_smoothing = a.options.label_smoothing;
  prepare_logits(a, prepared);
  prepare_gradient(a, memory, factor.is_known, std::move(into), prepared);
  prepare_target(a, prepared);
  prepare_weight(a, prepared);
  if (backend_of(a.input) != Backend::kCuda) return solve_on_cpu(a, prepared, factor, totals);
  return {solve_on_cuda(a, prepared.problem), {prepared.grad}};
}

}  // namespace fastopt
