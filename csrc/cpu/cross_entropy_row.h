// Cross-entropy of one wide row (contiguous classes), block by block: each logit is read from memory once.
// Where loss and gradient are computed apart, the gradient reads it once more, and has the loss's sums.
#pragma once

#include <algorithm>  // min

#include "cpu/isa.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"

namespace fastopt::cpu {

// Logits of a block and their exponentials stay in the first-level cache.
constexpr int64_t kRowBlock = 2048;
// Sums are kept apart by lane, several vectors of any instruction set: none waits for the one before, and none is added
// up across its lanes before the end.
constexpr int64_t kLanes = 64;
// Terms of one lane summed in the compute type before the sum moves to double.
constexpr int64_t kSumTerms = 16;

template <class S>
struct Row {
  using T = compute_t<S>;
  const S* logits;
  const S* probabilities;
  gradient_t<S>* grad;  // may be logits
  T* exps;              // n_classes, may be grad
  double* offsets;      // one for each block: the maximum its exponentials are relative to
  int64_t n_classes;
  int64_t target;
};

// Sums of terms, by lane: of a few in the compute type, of all in double.
template <class T>
struct LaneSums {
  alignas(64) T few[kLanes] = {};
  alignas(64) double all[kLanes] = {};

  FASTOPT_HD void flush() {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      all[l] += few[l];
      few[l] = 0;
    }
  }
  FASTOPT_HD double total() const {
    double total = 0;
    for (int64_t l = 0; l < kLanes; ++l) total += all[l];
    return total;
  }
};

// Sums over the classes, relative to max.
template <class T, TargetKind kTarget>
struct RowLaneSums {
  // An even spread's q is known from the number of classes.
  static constexpr bool kSumsQ = kTarget != TargetKind::kIndex && kTarget != TargetKind::kIndexUniform;
  // The lowest finite number, not -inf: a row may start with logits of -inf, and -inf - -inf is not a number.
  T max = std::numeric_limits<T>::lowest();
  LaneSums<T> exp, q, qx;

  FASTOPT_HD void flush() {
    exp.flush();
    if constexpr (kSumsQ) q.flush();
    if constexpr (kTarget != TargetKind::kIndex) qx.flush();
  }
  FASTOPT_HD RowSums<double> total() const {
    if constexpr (kTarget == TargetKind::kIndex) return {static_cast<double>(max), exp.total()};
    return {static_cast<double>(max), exp.total(), q.total(), qx.total()};
  }
  // even_q: what an even spread has given the classes so far.
  FASTOPT_HD void rebase(T new_max, double even_q) {
    const double shift = static_cast<double>(max) - static_cast<double>(new_max);
    const double factor = std::exp(shift);
    for (int64_t l = 0; l < kLanes; ++l) exp.all[l] *= factor;
    // Not 0 times the infinity that leaving the lowest number gives.
    if constexpr (kSumsQ) {
      for (int64_t l = 0; l < kLanes; ++l) qx.all[l] += q.all[l] != 0 ? q.all[l] * shift : 0;
    } else if (even_q != 0) {
      qx.all[0] += even_q * shift;
    }
    max = new_max;
  }
};

// A block in the compute type: as it lies, or converted into the buffer.
template <class S>
FASTOPT_HD const compute_t<S>* widened(const S* from, int64_t n, compute_t<S>* buffer) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

template <class T>
FASTOPT_HD T max_of(const T* x, int64_t n) {
  // By lane, so that no maximum waits for the one before.
  alignas(64) T lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = std::numeric_limits<T>::lowest();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  }
  T max = std::numeric_limits<T>::lowest();
  for (int64_t l = 0; l < kLanes; ++l) max = lanes[l] > max ? lanes[l] : max;
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

// Adds the exponentials and q of n <= kLanes classes to the sums, relative to sums.max; keeps the exponentials if a
// gradient is wanted. `first` counts the classes before them.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_classes(const T* x, const T* y, const TargetTerms<T> terms, int64_t first, int64_t n, T* exps,
                            RowLaneSums<T, kTarget>& sums) {
  const T max = sums.max;
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) {
    const T shifted = x[l] - max;
    const T e = exp_nonpositive(shifted);
    sums.exp.few[l] += e;
    if constexpr (kWantsGrad) exps[l] = e;
    if constexpr (kTarget != TargetKind::kIndex) {
      const T q = spread_q<T, kTarget>(terms, first + l, has_index(kTarget) ? T(0) : y[l]);
      if constexpr (RowLaneSums<T, kTarget>::kSumsQ) sums.q.few[l] += q;
      sums.qx.few[l] += q * shifted;
    }
  }
}

// The same of a block. `ahead` is where the next block's memory begins.
template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_block(const compute_t<S>* x, const compute_t<S>* y, const TargetTerms<compute_t<S>> terms,
                          int64_t first, int64_t n, const S* ahead, compute_t<S>* exps,
                          RowLaneSums<compute_t<S>, kTarget>& sums) {
  using T = compute_t<S>;
  constexpr int64_t kLineElements = 64 / sizeof(S);
  for (int64_t part = 0; part < n; part += kSumTerms * kLanes) {
    const int64_t end = std::min(part + kSumTerms * kLanes, n);
    int64_t i = part;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t l = 0; l < kLanes; l += kLineElements) __builtin_prefetch(ahead + i + l);
      add_classes<T, kTarget, kWantsGrad>(x + i, y + (has_index(kTarget) ? 0 : i), terms, first + i, kLanes,
                                          exps + (kWantsGrad ? i : 0), sums);
    }
    if (i < end) {
      add_classes<T, kTarget, kWantsGrad>(x + i, y + (has_index(kTarget) ? 0 : i), terms, first + i, end - i,
                                          exps + (kWantsGrad ? i : 0), sums);
    }
    sums.flush();
  }
}

// Gradients of a block from its exponentials; `first` counts the classes before it.
template <class S, TargetKind kTarget>
FASTOPT_HD void write_block(const compute_t<S>* exps, const S* y, const TargetTerms<compute_t<S>> terms, int64_t first,
                            int64_t n, compute_t<S> factor, compute_t<S> scale, gradient_t<S>* grad) {
  using T = compute_t<S>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T probability = 0;
    if constexpr (!has_index(kTarget)) probability = load(y[i]);
    store(grad[i], class_gradient<T, kTarget>(exps[i], factor, scale, terms, first + i, probability));
  }
}

template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES double row_cross_entropy(const Row<S>& row, const TargetTerms<compute_t<S>>& terms, double grad_scale,
                                        RowTotals* totals) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  // Read before exponentials may take the logits' place.
  const double target_logit = kHasTarget ? static_cast<double>(load(row.logits[row.target])) : 0.0;
  alignas(64) T x_buffer[kRowBlock];
  [[maybe_unused]] alignas(64) T y_buffer[kRowBlock];
  RowLaneSums<T, kTarget> lane_sums;
  for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
    const int64_t n = std::min(kRowBlock, row.n_classes - first);
    const T* x = widened(row.logits + first, n, x_buffer);
    const T* y = nullptr;
    if constexpr (!kHasTarget) y = widened(row.probabilities + first, n, y_buffer);
    const T max = max_of(x, n);
    if (max > lane_sums.max) lane_sums.rebase(max, static_cast<double>(terms.off) * first);
    if constexpr (kWantsGrad) row.offsets[first / kRowBlock] = lane_sums.max;
    add_block<S, kTarget, kWantsGrad>(x, y, terms, first, n, row.logits + first + kRowBlock,
                                      kWantsGrad ? row.exps + first : nullptr, lane_sums);
  }
  RowSums<double> sums = lane_sums.total();
  if constexpr (kHasTarget) sums.q_sum = terms.spread_sum;
  const double loss =
      row_loss(sums, std::log(sums.exp_sum), terms.on, target_logit, kHasTarget, kTarget != TargetKind::kIndex);
  if (totals) *totals = {sums.max, sums.exp_sum, sums.q_sum};

  if constexpr (kWantsGrad) {
    const double q_sum = sums.q_sum + (kHasTarget ? terms.on : 0);
    const double factor = grad_scale * q_sum / sums.exp_sum;
    const T target_exp = kHasTarget ? row.exps[row.target] : T(0);
    for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
      const int64_t n = std::min(kRowBlock, row.n_classes - first);
      const double offset = row.offsets[first / kRowBlock];
      const double block_factor = offset == sums.max ? factor : factor * std::exp(offset - sums.max);
      gradient_t<S>* grad = row.grad + first;
      write_block<S, kTarget>(row.exps + first, row.probabilities + (kHasTarget ? 0 : first), terms, first, n,
                              static_cast<T>(block_factor), static_cast<T>(grad_scale), grad);
      const int64_t target = row.target - first;
      if (kHasTarget && target >= 0 && target < n) {
        const double value =
            target_gradient<T, kTarget>(target_exp, block_factor, grad_scale, terms, terms.on, row.target);
        store(grad[target], static_cast<T>(value));
      }
    }
  }
  return loss;
}

// The gradient of a row whose totals are known, which may go over its logits.
template <class S, TargetKind kTarget>
FASTOPT_CLONES void row_gradient(const Row<S>& row, const TargetTerms<compute_t<S>> terms, double grad_scale,
                                 const RowTotals& totals) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  const double exact_factor = grad_scale * (totals.q_sum + (kHasTarget ? terms.on : 0)) / totals.exp_sum;
  const T factor = static_cast<T>(exact_factor), scale = static_cast<T>(grad_scale), max = static_cast<T>(totals.max);
  const T target_logit = kHasTarget ? load(row.logits[row.target]) : T(0);
  alignas(64) T x_buffer[kRowBlock];
  for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
    const int64_t n = std::min(kRowBlock, row.n_classes - first);
    const T* x = widened(row.logits + first, n, x_buffer);
    const S* y = row.probabilities + (kHasTarget ? 0 : first);
    gradient_t<S>* grad = row.grad + first;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T probability = 0;
      if constexpr (!kHasTarget) probability = load(y[i]);
      const T e = exp_nonpositive(x[i] - max);
      store(grad[i], class_gradient<T, kTarget>(e, factor, scale, terms, first + i, probability));
    }
  }
  if constexpr (kHasTarget) {
    const T e = exp_nonpositive(target_logit - max);
    const double value = target_gradient<T, kTarget>(e, exact_factor, grad_scale, terms, terms.on, row.target);
    store(row.grad[row.target], static_cast<T>(value));
  }
}

}  // namespace fastopt::cpu
