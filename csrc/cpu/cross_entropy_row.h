// Cross-entropy of one wide row (contiguous classes), block by block: each logit is read from memory once.
#pragma once

#include <algorithm>  // min

#include "cpu/isa.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"

namespace fastopt::cpu {

// Logits of a block and their exponentials stay in the first-level cache.
constexpr int64_t kRowBlock = 2048;
// Terms summed in the compute type before the sum moves to double.
constexpr int64_t kSumBlock = 256;

template <class S>
struct Row {
  using T = compute_t<S>;
  const S* logits;
  const S* probabilities;
  gradient_t<S>* grad;
  T* exps;          // n_classes, may be grad
  double* offsets;  // one for each block: the maximum its exponentials are relative to
  int64_t n_classes;
  int64_t target;
};

template <class S>
FASTOPT_HD compute_t<S> block_max(const S* x, int64_t n) {
  using T = compute_t<S>;
  T max = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const T value = load(x[i]);
    max = value > max ? value : max;
  }
  return max;
}

// Adds some classes' exponentials and q to the sums, relative to sums.max; keeps the exponentials if a gradient is
// wanted.
template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_terms(const Row<S>& row, const TargetTerms<compute_t<S>> terms, int64_t first, int64_t n,
                          RowSums<double>& sums) {
  using T = compute_t<S>;
  const S* x = row.logits + first;
  [[maybe_unused]] const S* y = row.probabilities + (has_index(kTarget) ? 0 : first);
  T* exps = row.exps + (kWantsGrad ? first : 0);
  const T max = static_cast<T>(sums.max);
  T exp_sum = 0, q_sum = 0, qx_sum = 0;
#pragma omp simd reduction(+ : exp_sum, q_sum, qx_sum)
  for (int64_t i = 0; i < n; ++i) {
    const T shifted = load(x[i]) - max;
    const T e = exp_nonpositive(shifted);
    exp_sum += e;
    if constexpr (kWantsGrad) exps[i] = e;
    if constexpr (kTarget != TargetKind::kIndex) {
      T probability = 0;
      if constexpr (!has_index(kTarget)) probability = load(y[i]);
      const T q = spread_q<T, kTarget>(terms, first + i, probability);
      if constexpr (kTarget != TargetKind::kIndexUniform) q_sum += q;
      qx_sum += q * shifted;
    }
  }
  sums.exp_sum += exp_sum;
  sums.q_sum += q_sum;
  sums.qx_sum += qx_sum;
}

template <class S, TargetKind kTarget>
FASTOPT_HD void write_block(const Row<S>& row, const TargetTerms<compute_t<S>> terms, int64_t first, int64_t n,
                            compute_t<S> factor, compute_t<S> scale) {
  using T = compute_t<S>;
  const T* exps = row.exps + first;
  [[maybe_unused]] const S* y = row.probabilities + (has_index(kTarget) ? 0 : first);
  gradient_t<S>* grad = row.grad + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T value = factor * exps[i];
    if constexpr (kTarget != TargetKind::kIndex) {
      T probability = 0;
      if constexpr (!has_index(kTarget)) probability = load(y[i]);
      value -= scale * spread_q<T, kTarget>(terms, first + i, probability);
    }
    store(grad[i], value);
  }
}

template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES double row_cross_entropy(const Row<S>& row, const TargetTerms<compute_t<S>>& terms, double grad_scale) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  RowSums<double> sums{std::numeric_limits<T>::lowest()};
  for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
    const int64_t n = std::min(kRowBlock, row.n_classes - first);
    const T max = block_max(row.logits + first, n);
    if (max > sums.max) sums.rebase(max);
    if constexpr (kWantsGrad) row.offsets[first / kRowBlock] = sums.max;
    for (int64_t part = 0; part < n; part += kSumBlock) {
      add_terms<S, kTarget, kWantsGrad>(row, terms, first + part, std::min(kSumBlock, n - part), sums);
    }
    if constexpr (kTarget == TargetKind::kIndexUniform) sums.q_sum = static_cast<double>(terms.off) * (first + n);
  }
  if constexpr (kHasTarget) sums.q_sum = terms.spread_sum;
  const double target_logit = kHasTarget ? static_cast<double>(load(row.logits[row.target])) : 0.0;
  const double loss = row_loss(sums, terms.on, target_logit, kHasTarget, kTarget != TargetKind::kIndex);

  if constexpr (kWantsGrad) {
    const double q_sum = sums.q_sum + (kHasTarget ? terms.on : 0);
    const double factor = grad_scale * q_sum / sums.exp_sum;
    const auto block_factor = [&](int64_t first) {
      const double offset = row.offsets[first / kRowBlock];
      return offset == sums.max ? factor : factor * std::exp(offset - sums.max);
    };
    const T target_exp = kHasTarget ? row.exps[row.target] : T(0);
    for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
      const int64_t n = std::min(kRowBlock, row.n_classes - first);
      write_block<S, kTarget>(row, terms, first, n, static_cast<T>(block_factor(first)), static_cast<T>(grad_scale));
    }
    if constexpr (kHasTarget) {
      double value = block_factor(row.target / kRowBlock * kRowBlock) * target_exp - grad_scale * terms.on;
      if constexpr (kTarget != TargetKind::kIndex) {
        value -= grad_scale * spread_q<T, kTarget>(terms, row.target, T(0));
      }
      store(row.grad[row.target], static_cast<T>(value));
    }
  }
  return loss;
}

}  // namespace fastopt::cpu
