// Cross-entropy of a wide row (contiguous classes), block by block: each logit is read from memory once.
// Where loss and gradient are computed separately, the gradient reads it once more and reuses the loss's sums.
#pragma once

#include <cmath>  // log

#include "cpu/cross_entropy/row_blocks.h"
#include "cpu/cross_entropy/row_gradient.h"
#include "cpu/cross_entropy/row_sums.h"
#include "cpu/isa.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// Returns the loss of a row, and meanwhile writes the pending row's gradient.
template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES double read_row(const Row<S>& row, const TargetTerms<compute_t<S>>& terms, RowTotals& totals,
                               RowGradient<S, kTarget>& pending) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  // Read before exponentials may take the logits' place.
  const double target_logit = kHasTarget ? static_cast<double>(load(row.logits[row.target])) : 0.0;
  alignas(64) T x_buffer[kMaxRowBlock];
  [[maybe_unused]] alignas(64) T y_buffer[kMaxRowBlock];
  const bool writes = kWantsGrad && pending.is_pending();
  RowLaneSums<T, kTarget> lane_sums;
  for (int64_t first = 0, n; first < row.n_classes; first += n) {
    n = block_size(first, row.n_classes);
    const T* x;
    const T max = widen_and_find_max(row.logits + first, n, x_buffer, x);
    const T* y = nullptr;
    if constexpr (!kHasTarget) y = widened(row.probabilities + first, n, y_buffer);
    if (first == 0) {
      lane_sums.max = max;
    } else if (max > lane_sums.max) {
      lane_sums.rebase(max, static_cast<double>(terms.off) * first);
    }
    if (writes) pending.begin_block(first);
    if constexpr (kWantsGrad) row.offsets[first / kRowBlock] = lane_sums.max;
    add_block<S, kTarget, kWantsGrad>(
        row.logits + first, x, y, terms, first, n, kWantsGrad ? row.exps + first : nullptr, lane_sums,
        !kHasTarget || target_logit >= lane_sums.max, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          if (writes) pending.write_classes(first + i, m);
        });
  }
  if (writes) pending.end();
  RowSums<double> sums = lane_sums.total();
  if constexpr (kHasTarget) sums.q_sum = terms.smoothed_sum;
  totals = {sums.max, sums.exp_sum, sums.q_sum};
  return row_loss(sums, std::log(sums.exp_sum), terms.on, target_logit, kHasTarget, kTarget != TargetKind::kIndex);
}

}  // namespace fastopt::cpu
