// Predicts the factor by which a loss's gradient will be multiplied: programs that accumulate gradients, or average by
// hand, multiply each loss by the same number. A known factor costs nothing when the gradient is written.
#pragma once

#include <ATen/core/Reduction.h>

#include <optional>

#include "torch/losses/cross_entropy_kernel.h"

namespace fastopt {

// Losses of one kind are assumed to be multiplied by the same factor.
struct LossKind {
  uint64_t number = 0;
  int64_t reduction = 0;
  at::ScalarType loss_dtype = at::kFloat;
};
LossKind kind_of(const CrossEntropyArguments& arguments);

// True if the gradient is computed with the predicted factor. For reduction none it is not, since the positions may
// have different factors and it would have to be computed again; but float16 gains enough from being rounded at once.
inline bool is_predictable(const LossKind& kind) {
  return kind.reduction != at::Reduction::None || kind.loss_dtype == at::kHalf;
}

bool has_saved_tensor_hooks();

// The factor of the last loss of the same kind, initially 1; on the CPU, for ordinary tensors. A prediction never
// changes the gradient: if the factor turns out to be another, the gradient is computed again.
LossFactor predicted_factor(const CrossEntropyArguments& arguments);
// number: the factor, if all positions have the same. has_logits: true if the backward found the logits unchanged.
void record_factor(const LossKind& kind, std::optional<double> number, const LossGradient& gradient, bool has_logits);

// Computes the gradient again with another factor; `into`: memory that may be overwritten, if given. loss_sum: that of
// the loss, if the logits must be the same; the result is undefined if they are not.
at::Tensor recomputed_gradient(const CrossEntropyArguments& arguments, double factor, std::optional<double> loss_sum,
                               at::Tensor into);

// The backward in a compiled program. computed: the gradient that was computed with the loss, if any; nothing else
// references it.
at::Tensor compiled_backward(const CrossEntropyArguments& arguments, const at::Tensor& grad_output,
                             std::optional<LossGradient> computed);

}  // namespace fastopt
