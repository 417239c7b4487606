// The gradient of a wide row: from the exponentials that its loss has left, or from the logits and the row's totals.
#pragma once

#include <algorithm>  // min
#include <cmath>      // exp

#include "cpu/cross_entropy/row_blocks.h"
#include "cpu/isa.h"
#include "cpu/line_writer.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"

namespace fastopt::cpu {

// Row::target where the target's class is in another process's shard.
constexpr int64_t kTargetNotInRow = -1;

template <class S>
struct Row {
  using T = compute_t<S>;
  const S* logits;
  const S* probabilities;
  gradient_t<S>* grad;  // may point to the logits
  T* exps;              // n_classes; may point to grad if no gradient is pending
  double* offsets;      // one for each block: the maximum its exponentials are relative to
  int64_t n_classes;
  int64_t target;
};

// The gradient of a row whose exponentials are summed. It is written at once or, if it streams, while the next row's
// exponentials overwrite this one's: arithmetic, reading and writing then overlap.
template <class S, TargetKind kTarget>
class RowGradient {
  using T = compute_t<S>;
  static constexpr bool kHasTarget = has_index(kTarget);

 public:
  FASTOPT_HD bool is_pending() const { return is_pending_; }
  FASTOPT_HD void begin(const Row<S>& row, const TargetTerms<T>& terms, const RowTotals& totals, double grad_scale,
                        bool streams) {
    is_pending_ = true;
    row_ = row;
    terms_ = terms;
    max_ = totals.max;
    scale_ = grad_scale;
    factor_ = grad_scale * (totals.q_sum + (kHasTarget ? terms.on : 0)) / totals.exp_sum;
    if constexpr (kHasTarget) target_exp_ = row.exps[row.target];
    lines_.begin(row.grad, streams);
  }
  FASTOPT_HD void begin_block(int64_t first) {
    const double offset = row_.offsets[first / kRowBlock];
    block_factor_ = offset == max_ ? factor_ : factor_ * std::exp(offset - max_);
  }
  // Classes that may be written at once.
  FASTOPT_HD int64_t max_group() const { return lines_.streams() ? kLanes : kMaxRowBlock; }
  // Writes n classes; `first` counts those before them.
  FASTOPT_HD void write_classes(int64_t first, int64_t n) {
    const TargetTerms<T> terms = terms_;
    const T factor = static_cast<T>(block_factor_), scale = static_cast<T>(scale_);
    const T* exps = row_.exps + first;
    const S* y = row_.probabilities + (kHasTarget ? 0 : first);
    gradient_t<S>* grad = lines_.space(first);
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) {
      T probability = 0;
      if constexpr (!kHasTarget) probability = load(y[l]);
      store(grad[l], class_gradient<T, kTarget>(exps[l], factor, scale, terms, first + l, probability));
    }
    if constexpr (kHasTarget) {
      const int64_t t = row_.target - first;
      if (t >= 0 && t < n) {
        const double value =
            target_gradient<T, kTarget>(target_exp_, block_factor_, scale_, terms, terms.on, first + t);
        store(grad[t], static_cast<T>(value));
      }
    }
    lines_.write(first, n);
  }
  FASTOPT_HD void end() {
    lines_.end(row_.n_classes);
    is_pending_ = false;
  }
  FASTOPT_HD const Row<S>& row() const { return row_; }

 private:
  bool is_pending_ = false;
  Row<S> row_;
  TargetTerms<T> terms_;
  double max_, scale_, factor_, block_factor_;
  T target_exp_;
  LineWriter<gradient_t<S>, kLanes> lines_;
};

// Writes the pending row's gradient if no row follows.
template <class S, TargetKind kTarget>
FASTOPT_CLONES void write_row(RowGradient<S, kTarget>& pending) {
  const int64_t n_classes = pending.row().n_classes, group = pending.max_group();
  for (int64_t first = 0, end; first < n_classes; first = end) {
    pending.begin_block(first);
    end = first + block_size(first, n_classes);
    for (int64_t i = first; i < end; i += group) pending.write_classes(i, std::min(group, end - i));
  }
  pending.end();
}

// Writes the gradient of a row whose totals are known; it may overwrite the logits.
template <class S, TargetKind kTarget>
FASTOPT_CLONES void row_gradient(const Row<S>& row, const TargetTerms<compute_t<S>> terms, double grad_scale,
                                 const RowTotals& totals, bool streams) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  const double exact_factor = grad_scale * (totals.q_sum + (kHasTarget ? terms.on : 0)) / totals.exp_sum;
  const T factor = static_cast<T>(exact_factor), scale = static_cast<T>(grad_scale), max = static_cast<T>(totals.max);
  T target_value = 0;
  if (kHasTarget && row.target != kTargetNotInRow) {
    const T e = exp_nonpositive(load(row.logits[row.target]) - max);
    target_value =
        static_cast<T>(target_gradient<T, kTarget>(e, exact_factor, grad_scale, terms, terms.on, row.target));
  }
  alignas(64) T x_buffer[kMaxRowBlock];
  LineWriter<gradient_t<S>, kLanes> lines;
  lines.begin(row.grad, streams);
  for (int64_t first = 0, n; first < row.n_classes; first += n) {
    n = block_size(first, row.n_classes);
    const T* x = widened(row.logits + first, n, x_buffer);
    const S* y = row.probabilities + (kHasTarget ? 0 : first);
    for_groups(row.logits + first, 0, n, [&](int64_t begin, int64_t m) __attribute__((always_inline)) {
      gradient_t<S>* grad = lines.space(first + begin);
#pragma omp simd
      for (int64_t l = 0; l < m; ++l) {
        T probability = 0;
        if constexpr (!kHasTarget) probability = load(y[begin + l]);
        const T e = exp_nonpositive(x[begin + l] - max);
        store(grad[l], class_gradient<T, kTarget>(e, factor, scale, terms, first + begin + l, probability));
      }
      if constexpr (kHasTarget) {
        const int64_t t = row.target - first - begin;
        if (t >= 0 && t < m) store(grad[t], target_value);
      }
      lines.write(first + begin, m);
    });
  }
  lines.end(row.n_classes);
}

}  // namespace fastopt::cpu
