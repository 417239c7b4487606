// One thread's wide rows, one after the other.
#pragma once

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/row.h"
#include "cpu/scratch.h"

namespace fastopt::cpu {

// Reads the target of a position into its row and terms; false if it is ignored.
template <class S, class T>
bool read_target(CrossEntropyCall& call, int64_t position, Row<S>& row, TargetTerms<T>& terms) {
  row.target = call.read_target(position);
  if (row.target == call.problem.ignore_index) return false;
  if (terms.weight) terms.on *= terms.weight[row.target];
  return true;
}

template <class S, TargetKind kTarget, bool kWantsGrad>
class RowWorker {
  using T = compute_t<S>;
  static constexpr bool kHasTarget = has_index(kTarget);

 public:
  explicit RowWorker(CrossEntropyCall& call)
      : call_(call), p_(call.problem), shared_terms_(target_terms<T>(call.problem)), streams_(call.streams) {}

  // The sum of the rows' losses. The last row's gradient is not written yet.
  double operator()(int64_t begin, int64_t end) {
    if constexpr (kWantsGrad) {  // the same memory at each call
      offsets_ = scratch<double>(p_.logits_layout.n_classes / kRowBlock + 1, 0);
      exps_ = scratch<T>(p_.logits_layout.n_classes, 1);
    }
    CompensatedSum sum;
    for (int64_t i = begin; i < end; ++i) {
      const double loss = row_loss(i);
      store_loss<S>(p_, i, loss);
      sum.add(loss);
    }
    return sum.total();
  }
  void end() {
    if constexpr (kWantsGrad) {
      if (pending_.is_pending()) write_row(pending_);
    }
  }

 private:
  double row_loss(int64_t i) {
    Row<S> row{};
    row.n_classes = p_.logits_layout.n_classes;
    row.logits = static_cast<const S*>(p_.logits) + i * p_.logits_layout.outer_stride;
    if constexpr (kWantsGrad) row.grad = static_cast<gradient_t<S>*>(p_.grad) + i * p_.grad_layout.outer_stride;
    row.exps = exps_;
    if constexpr (std::is_same_v<T, gradient_t<S>>) {
      if (!streams_) row.exps = row.grad;
    }
    row.offsets = offsets_;
    TargetTerms<T> terms = shared_terms_;
    if constexpr (kHasTarget) {
      if (!read_target(call_, i, row, terms)) {
        if constexpr (kWantsGrad) memset(static_cast<void*>(row.grad), 0, row.n_classes * sizeof(*row.grad));
        return 0;
      }
    } else {
      row.probabilities = static_cast<const S*>(p_.probabilities) + i * p_.probabilities_layout.outer_stride;
    }
    if (kWantsGrad && p_.totals) {
      row_gradient<S, kTarget>(row, terms, p_.grad_scale, p_.totals[i], streams_);
      return 0;
    }
    RowTotals totals;
    const double loss = read_row<S, kTarget, kWantsGrad>(row, terms, totals, pending_);
    if constexpr (kWantsGrad) {
      pending_.begin(row, terms, totals, p_.grad_scale, streams_);
      if (!streams_) write_row(pending_);
    } else if (p_.totals) {
      p_.totals[i] = totals;
    }
    return loss;
  }

  CrossEntropyCall& call_;
  const CrossEntropyProblem& p_;
  const TargetTerms<T> shared_terms_;
  const bool streams_;
  double* offsets_ = nullptr;
  T* exps_ = nullptr;
  RowGradient<S, kTarget> pending_;
};

}  // namespace fastopt::cpu
