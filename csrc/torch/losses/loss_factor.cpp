#include "torch/losses/loss_factor.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/div.h>

#include <array>
#include <cmath>  // fabs, isnan
#include <mutex>
#include <utility>  // move

#include "torch/context.h"
#include "torch/losses/scale_gradient.h"

namespace fastopt {
namespace {

class LossFactors {
 public:
  LossFactor predicted(uint64_t kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Entry& entry = entry_of(kind);
    return entry.kind == kind ? entry.factor : LossFactor{};
  }
  void remember(uint64_t kind, LossFactor factor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const double size = std::fabs(factor.number);
    entry_of(kind) = {kind, size >= kMinLossFactor && size <= 1 / kMinLossFactor ? factor : LossFactor{}};
  }

 private:
  struct Entry {
    uint64_t kind = 0;
    LossFactor factor;
  };
  Entry& entry_of(uint64_t kind) { return entries_[kind % entries_.size()]; }

  std::array<Entry, 61> entries_;
  std::mutex mutex_;
};

LossFactors& loss_factors() {
  static LossFactors factors;
  return factors;
}

}  // namespace

LossKind kind_of(const CrossEntropyArguments& a) {
  const int64_t n_classes = a.input.size(a.input.dim() > 1 ? 1 : 0);
  const auto dtype = a.input.scalar_type();
  const uint64_t number = static_cast<uint64_t>(n_classes) * 64 + static_cast<uint64_t>(dtype) % 16 * 4 +
                          static_cast<uint64_t>(a.options.reduction) + 1;
  return {number, a.options.reduction, a.options.in_float32 ? at::kFloat : dtype};
}

bool has_saved_tensor_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

LossFactor predicted_factor(const CrossEntropyArguments& arguments) {
  const LossKind kind = kind_of(arguments);
  return is_predictable(kind) && backend_of(arguments.input) == Backend::kCpu && !has_saved_tensor_hooks()
             ? loss_factors().predicted(kind.number)
             : LossFactor{};
}

void record_factor(const LossKind& kind, std::optional<double> number, const LossGradient& gradient, bool has_logits) {
  if (!is_predictable(kind)) return;
  LossFactor factor{number.value_or(1)};
  constexpr LossFactor kMean{1, true};
  if (kind.reduction == at::Reduction::Sum && number == kMean.of(gradient.denominator, kind.loss_dtype)) factor = kMean;
  factor.is_known = number && has_logits;
  loss_factors().remember(kind.number, factor);
}

at::Tensor recomputed_gradient(const CrossEntropyArguments& arguments, double factor, std::optional<double> loss_sum,
                               at::Tensor into) {
  if (!is_backed(arguments.input)) return {};
  const bool is_given = into.defined();
  const LossFactor known{factor, /*is_mean=*/false, /*is_known=*/true};
  const LossGradient found =
      cross_entropy_kernel(arguments, GradientMemory::kFresh, known, /*totals=*/nullptr, std::move(into)).second;
  if (!loss_sum || found.loss_sum == *loss_sum || (std::isnan(found.loss_sum) && std::isnan(*loss_sum))) {
    return found.grad;
  }
  TORCH_CHECK(!is_given,
              "fastopt: logits or target were changed between a cross-entropy and its backward, and not so that "
              "autograd could see it (through .data, or as another library's memory)");
  return {};
}

at::Tensor compiled_backward(const CrossEntropyArguments& arguments, const at::Tensor& grad_output,
                             std::optional<LossGradient> computed) {
  check_backed(grad_output, "grad_output");
  const auto number = repeated_number_in(grad_output);
  const auto dtype = arguments.input.scalar_type();
  const LossKind kind = kind_of(arguments);
  const bool has_factor = number && is_predictable(kind);
  if (computed && computed->is_final && !number) computed.reset();
  if (!computed) {
    const LossFactor wanted{has_factor ? *number : 1, /*is_mean=*/false, /*is_known=*/has_factor};
    computed = cross_entropy_kernel(arguments, GradientMemory::kFresh, wanted).second;
  }
  at::Tensor& grad = computed->grad;
  double& factor = computed->factor;
  record_factor(kind, number, *computed, /*has_logits=*/true);
  if (has_factor && *number != factor) {
    check_backed(arguments.input, "input");
    // A compiled program does not overwrite its logits, but may recompute them with other rounding.
    grad = recomputed_gradient(arguments, *number, /*loss_sum=*/std::nullopt, std::move(grad));
    factor = *number;
  }
  if (number) return scale_gradient(grad, *number == factor ? 1 : *number / factor, dtype, /*may_reuse=*/true);
  const at::Tensor rest = factor == 1 ? grad_output : at::div(grad_output, factor);
  return scale_gradient(grad, along_classes(rest, grad), dtype, /*may_reuse=*/true);
}

}  // namespace fastopt
