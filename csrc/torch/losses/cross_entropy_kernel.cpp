#include "torch/losses/cross_entropy_kernel.h"

#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <cmath>        // fabs
#include <limits>       // numeric_limits
#include <type_traits>  // conditional_t

#include "cpu/cross_entropy/solve.h"
#include "cpu/cross_entropy/targets.h"
#include "torch/context.h"
#include "torch/large_arrays.h"
#include "torch/losses/cross_entropy_cuda.h"

namespace fastopt {
namespace {

// Sizes and strides of the positions: all dimensions but the class dimension.
struct Positions {
  c10::SmallVector<int64_t, 6> sizes, strides;
  // True if the dimensions from `first` on are one evenly strided run; sets its length and stride.
  bool collapse(size_t first, int64_t& n, int64_t& stride) const {
    n = 1;
    stride = 1;
    int64_t expected = -1;
    for (size_t i = sizes.size(); i-- > first;) {
      if (sizes[i] == 1) continue;
      if (expected < 0) {
        stride = strides[i];
      } else if (strides[i] != expected) {
        return false;
      }
      n *= sizes[i];
      expected = strides[i] * sizes[i];
    }
    return true;
  }
};

int64_t class_dim(size_t n_dims) { return n_dims == 1 ? 0 : 1; }

Positions positions_of(at::IntArrayRef sizes, at::IntArrayRef strides) {
  Positions positions;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (static_cast<int64_t>(d) == class_dim(sizes.size())) continue;
    positions.sizes.push_back(sizes[d]);
    positions.strides.push_back(strides[d]);
  }
  return positions;
}

// The layout by which a kernel reads logits of these strides without a copy, if it can.
std::optional<LogitLayout> layout_of(at::IntArrayRef sizes, at::IntArrayRef all_strides) {
  const int64_t dim = class_dim(sizes.size());
  const int64_t n_classes = sizes[dim];
  const int64_t class_stride = n_classes == 1 ? 1 : all_strides[dim];
  const Positions positions = positions_of(sizes, all_strides);
  int64_t n = 0, stride = 0;
  const bool is_one_run = positions.collapse(0, n, stride);
  // Rows: (N, C), channels_last images, or one row.
  if (is_one_run && class_stride == 1) return LogitLayout{n, n_classes, 1, stride, 1};
  // Columns of one image: a transposed (N, C).
  if (is_one_run && stride == 1) return LogitLayout{1, n_classes, n, 0, class_stride};
  // Columns of N images: (N, C, d1, ...).
  if (!positions.sizes.empty() && positions.collapse(1, n, stride) && stride == 1) {
    return LogitLayout{positions.sizes[0], n_classes, n, positions.strides[0], class_stride};
  }
  return std::nullopt;
}

std::optional<LogitLayout> layout_of(const at::Tensor& logits) { return layout_of(logits.sizes(), logits.strides()); }

bool same_kind(const LogitLayout& a, const LogitLayout& b) {
  return a.n_outer == b.n_outer && a.n_inner == b.n_inner && a.is_rows() == b.is_rows();
}

c10::SmallVector<int64_t, 6> strides_if_contiguous(at::IntArrayRef sizes) {
  c10::SmallVector<int64_t, 6> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

// Uninitialised memory of the size of the logits.
at::Tensor empty_like_logits(const at::Tensor& logits, at::IntArrayRef strides, at::ScalarType dtype) {
  if (logits.is_cpu()) return empty_large(logits.sizes(), strides, dtype);
  return at::empty_strided(logits.sizes(), strides, logits.options().requires_grad(false).dtype(dtype));
}

bool is_16_bit(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

bool is_dense(const at::Tensor& tensor) { return tensor.is_contiguous() || tensor.is_non_overlapping_and_dense(); }

}  // namespace

bool fits_kernel(const CrossEntropyArguments& a) {
  const at::Tensor& input = a.input;
  const at::Tensor& target = a.target;
  const bool has_device = input.device().is_cpu() || (input.device().is_cuda() && cuda_service().takes_cuda);
  if (!has_device || target.device() != input.device() || !dtype_of(input)) return false;
  if (input.dim() < 1 || input.sym_numel() == 0 || a.reduction < 0 || a.reduction > 2) return false;
  if (!(a.label_smoothing >= 0 && a.label_smoothing <= 1)) return false;
  // A gradient in 16 bits may be multiplied by a number, not by a float32 number of each position: see scale_gradient.
  if (a.in_float32 && (!is_16_bit(input) || !is_for_cpu_kernels(input) || a.reduction == at::Reduction::None))
    return false;
  const int64_t dim = class_dim(input.dim());
  if (a.weight) {
    const at::Tensor& weight = *a.weight;
    const bool has_type = weight.scalar_type() == input.scalar_type() ||
                          (a.in_float32 && (is_16_bit(weight) || weight.scalar_type() == at::kFloat));
    if (weight.device() != input.device() || !has_type || weight.requires_grad()) return false;
    if (weight.dim() != 1 || weight.sym_size(0) != input.sym_size(dim)) return false;
  }
  const bool has_indices = target.scalar_type() == at::kLong;
  if (!has_indices && (target.scalar_type() != input.scalar_type() || target.requires_grad() || a.ignore_index >= 0)) {
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
                                                         LossFactor given_factor, at::Tensor* totals, at::Tensor into) {
  TORCH_CHECK(kernel_takes(a), "fastopt::cross_entropy_forward: shapes, dtypes or devices do not fit a kernel");
  check_backed(a.input, "input");
  check_backed(a.target, "target");
  if (a.weight) check_backed(*a.weight, "weight");
  // Keeps the memory alive: another thread may give a tensor other memory while the kernel runs.
  const c10::Storage held[] = {a.input.storage(), a.target.storage(), a.weight ? a.weight->storage() : c10::Storage()};
  const bool has_indices = a.target.scalar_type() == at::kLong;
  const bool is_half = a.input.scalar_type() == at::kHalf;
  const bool is_cuda = backend_of(a.input) == Backend::kCuda;
  const auto compute_type = a.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  CrossEntropyProblem problem{};
  problem.dtype = *dtype_of(a.input);
  problem.ignore_index = a.ignore_index;
  problem.label_smoothing = a.label_smoothing;

  // The gradient has the strides of the logits. Logits whose strides a kernel does not support are copied once.
  at::Tensor input = a.input;
  auto layout = layout_of(input);
  auto strides = strides_if_contiguous(input.sizes());
  if (is_dense(input)) strides.assign(input.strides().begin(), input.strides().end());
  auto dense_layout = layout_of(input.sizes(), strides);
  if (!layout || !dense_layout || !same_kind(*layout, *dense_layout)) {
    input = input.contiguous();
    strides = strides_if_contiguous(input.sizes());
    layout = dense_layout = layout_of(input);
  }
  problem.logits_layout = *layout;
  problem.logits = input.const_data_ptr();
  at::Tensor grad;
  if (memory == GradientMemory::kLogits && input.is_same(a.input) && !(is_half && is_cuda)) {
    grad = input.alias();
    problem.grad_layout = *layout;
    problem.is_grad_final = is_half;
  } else if (memory != GradientMemory::kNone) {
    problem.is_grad_final = is_half && !is_cuda && given_factor.is_known;
    const auto dtype = is_half && !problem.is_grad_final ? at::kFloat : input.scalar_type();
    const bool is_given = into.defined() && into.scalar_type() == dtype && into.sizes() == input.sizes() &&
                          into.strides() == at::IntArrayRef(strides);
    if (is_given) {
      grad = std::move(into);
    } else {
      into.reset();
      grad = empty_like_logits(input, strides, dtype);
    }
    problem.grad_layout = *dense_layout;
  }
  if (grad.defined()) problem.grad = grad.mutable_data_ptr();

  // The target, in the order of the positions.
  at::Tensor target = a.target;
  if (has_indices) {
    if (!target.is_contiguous()) target = target.contiguous();
    problem.target = target.const_data_ptr<int64_t>();
  } else {
    problem.probabilities_layout = *dense_layout;
    const auto target_layout = layout_of(target);
    if (target_layout && same_kind(*target_layout, *layout)) {
      problem.probabilities_layout = *target_layout;
    } else {
      target = empty_like_logits(input, strides, input.scalar_type()).copy_(a.target);
    }
    problem.probabilities = target.const_data_ptr();
  }
  at::Tensor weight;
  problem.weight_sum = static_cast<double>(layout->n_classes);
  if (a.weight) {
    weight = a.weight->is_contiguous() ? *a.weight : a.weight->contiguous();
    if (weight.scalar_type() != compute_type) weight = weight.to(compute_type);
    problem.weight = weight.const_data_ptr();
  }
  const auto loss_sizes = positions_of(a.input.sizes(), a.input.strides()).sizes;
  if (is_cuda) {
    ++kernel_calls().cross_entropy;
    return {cross_entropy_cuda(a, problem, loss_sizes), {grad}};
  }
  if (a.weight && has_indices &&
      a.label_smoothing != 0) {  // otherwise a weight that is not finite would affect every row
    problem.weight_sum = cpu::sum_weights(problem);
  }

  // All targets are checked before one is used; their tally gives the mean's denominator.
  const cpu::Threads threads = torch_threads();
  const int64_t n_positions = layout->n_outer * layout->n_inner;
  double denominator = static_cast<double>(n_positions);
  if (has_indices) {
    const cpu::TargetTally tally = cpu::tally_targets(problem, threads);
    TORCH_CHECK_INDEX(tally.is_valid, "Target ", tally.bad_target, " is out of bounds.");
    denominator = tally.weight_sum;
  }
  // 0 / 0, whatever is smoothed over other classes.
  if (denominator == 0) denominator = std::numeric_limits<double>::quiet_NaN();
  auto options = a.input.options().requires_grad(false);
  if (a.in_float32) options = options.dtype(at::kFloat);
  const double factor = given_factor.of(denominator, c10::typeMetaToScalarType(options.dtype()));
  problem.grad_scale = a.reduction == at::Reduction::Mean ? factor / denominator : factor;
  if (totals && !grad.defined() && cpu::uses_totals(*layout, problem.dtype)) {
    *totals = at::empty({n_positions, sizeof(RowTotals)}, options.dtype(at::kByte));
  }
  if (totals && totals->defined()) problem.totals = static_cast<RowTotals*>(totals->mutable_data_ptr());

  at::Tensor loss;
  const bool is_known = grad.defined() && problem.totals;
  const bool is_reduced = a.reduction != at::Reduction::None;
  if (!is_known) loss = at::empty(is_reduced ? at::IntArrayRef() : at::IntArrayRef(loss_sizes), options);
  if (!is_known && !is_reduced) problem.losses = loss.mutable_data_ptr();
  double sum = 0;
  TORCH_CHECK_INDEX(cpu::cross_entropy(problem, threads, &sum),
                    "A target was changed to one that is out of bounds while the loss was computed.");
  if (!is_known && is_reduced) {
    const double value = a.reduction == at::Reduction::Mean ? sum / denominator : sum;
    with_stored_type(a.in_float32 ? DType::kFloat32 : problem.dtype, [&](auto stored) {
      using L = decltype(stored);
      store(*static_cast<L*>(loss.mutable_data_ptr()), static_cast<compute_t<L>>(value));
    });
  }
  ++kernel_calls().cross_entropy;
  return {loss, {grad, factor, denominator, sum, problem.is_grad_final}};
}

}  // namespace fastopt
