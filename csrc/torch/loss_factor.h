// What the gradient of a loss will be multiplied by: programs that accumulate gradients, or average by hand, multiply
// each loss by the same number. Known beforehand, it costs nothing where the gradient is written.
#pragma once

#include <ATen/core/Reduction.h>

#include <optional>

#include "torch/cross_entropy_kernel.h"

namespace fastopt {

// Of losses that a program multiplies by the same number, as far as can be told.
struct LossKind {
  uint64_t number = 0;
  int64_t reduction = 0;
  at::ScalarType loss_dtype = at::kFloat;
};
LossKind kind_of(const CrossEntropyArguments& arguments);

// Whether the gradient is computed with the factor. Losses of each position may have factors of their own, and then it
// would have to be computed again; float16 gains enough from being rounded at once.
inline bool is_foreseeable(const LossKind& kind) {
  return kind.reduction != at::Reduction::None || kind.loss_dtype == at::kHalf;
}

bool has_saved_tensor_hooks();

// The factor that the last loss of the same kind had, and 1 at first, for the gradient of this one: on the CPU, of an
// ordinary tensor. A gradient is the same whether its factor was foreseen or not, for another factor than the foreseen
// one computes it anew.
LossFactor foreseen_factor(const CrossEntropyArguments& arguments);
// number: if all positions have the same. has_logits: whether the backward found them as the loss had: the next one may
// count on them.
void remember_factor(const LossKind& kind, std::optional<double> number, const LossGradient& gradient, bool has_logits);

// The gradient with another factor than it was computed with, into memory that nobody needs, if it is given. loss_sum:
// of the loss that was computed with it, if the logits must be the same; undefined if they are not.
at::Tensor computed_anew(const CrossEntropyArguments& arguments, double factor, std::optional<double> loss_sum,
                         at::Tensor into);

// The gradient of a loss whose own gradient is grad_output, from the one that was computed with the loss and that
// nobody else holds, if it was.
at::Tensor finished_gradient(const CrossEntropyArguments& arguments, const at::Tensor& grad_output,
                             std::optional<LossGradient> computed);

}  // namespace fastopt
