// Cross-entropy of one wide row (contiguous classes), block by block: each logit is read from memory once.
#pragma once

#include <algorithm>  // min

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// Logits of a block and their exponentials stay in the first-level cache.
constexpr int64_t kRowBlock = 2048;
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

// Sums over the classes, by lane, relative to max.
template <class T>
struct RowLaneSums {
  // The lowest finite number, not -inf: a row may start with logits of -inf, and -inf - -inf is not a number.
  T max = std::numeric_limits<T>::lowest();
  LaneSums<T> exp, q, qx;

  FASTOPT_HD RowSums<double> total() const { return {static_cast<double>(max), exp.total(), q.total(), qx.total()}; }
  template <TargetKind kTarget>
  FASTOPT_HD void rebase(T new_max) {
    const double shift = static_cast<double>(max) - static_cast<double>(new_max);
    exp.sums *= std::exp(shift);
    if constexpr (kTarget != TargetKind::kIndex) {
      // Not 0 times the infinity that leaving the lowest number gives.
      for (int64_t i = 0; i < kLanes<T>; ++i) qx.sums[i] += q.sums[i] != 0 ? q.sums[i] * shift : 0;
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
  Lanes<T> lanes = Lanes<T>{} + std::numeric_limits<T>::lowest(), more = lanes;
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
    const Lanes<T> a = load_lanes(x + i), b = load_lanes(x + i + kLanes<T>);
    lanes = a > lanes ? a : lanes;
    more = b > more ? b : more;
  }
  lanes = more > lanes ? more : lanes;
  for (; i < n; i += kLanes<T>) {
    const Lanes<T> a = load_lanes(x + i, std::min(kLanes<T>, n - i), std::numeric_limits<T>::lowest());
    lanes = a > lanes ? a : lanes;
  }
  T max = lanes[0];
  for (int64_t k = 1; k < kLanes<T>; ++k) max = lanes[k] > max ? lanes[k] : max;
  return max;
}

// Adds a block's exponentials and q to the sums, relative to sums.max; keeps the exponentials if a gradient is wanted.
// `ahead` is where the next block's memory begins.
template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_block(const compute_t<S>* x, const compute_t<S>* y, const TargetTerms<compute_t<S>> terms,
                          int64_t first, int64_t n, const S* ahead, compute_t<S>* exps,
                          RowLaneSums<compute_t<S>>& sums) {
  using T = compute_t<S>;
  using V = Lanes<T>;
  const T max = sums.max;
  V exp_sum{}, q_sum{}, qx_sum{};
  const auto add = [&](int64_t i, int64_t n_lanes, auto is_whole) __attribute__((always_inline)) {
    constexpr bool kIsWhole = decltype(is_whole)::value;
    const auto take = [&](const T* from, T rest) __attribute__((always_inline)) {
      return kIsWhole ? load_lanes(from) : load_lanes(from, n_lanes, rest);
    };
    const V shifted = take(x + i, max) - max;
    V e = exp_nonpositive(shifted);
    if constexpr (!kIsWhole) e = keep_first<T>(e, n_lanes);
    exp_sum += e;
    if constexpr (kWantsGrad) store_lanes<T>(exps + i, e, n_lanes);
    if constexpr (kTarget != TargetKind::kIndex) {
      V weight{}, probability{};
      if constexpr (is_weighted(kTarget)) weight = take(terms.weight + first + i, T(0));
      if constexpr (!has_index(kTarget)) probability = take(y + i, T(0));
      V q = spread_q<kTarget>(terms, weight, probability);
      if constexpr (!kIsWhole) q = keep_first<T>(q, n_lanes);
      q_sum += q;
      qx_sum += q * shifted;
    }
  };
  const auto flush = [&]() __attribute__((always_inline)) {
    sums.exp.add(exp_sum);
    exp_sum = V{};
    if constexpr (kTarget != TargetKind::kIndex) {
      sums.q.add(q_sum);
      sums.qx.add(qx_sum);
      q_sum = qx_sum = V{};
    }
  };
  const int64_t n_whole = n / kLanes<T> * kLanes<T>;
  for (int64_t part = 0; part < n_whole; part += kSumTerms * kLanes<T>) {
    const int64_t end = std::min(part + kSumTerms * kLanes<T>, n_whole);
    for (int64_t i = part; i < end; i += kLanes<T>) {
      __builtin_prefetch(ahead + i);
      add(i, kLanes<T>, BoolConstant<true>{});
    }
    flush();
  }
  if (n_whole < n) {
    add(n_whole, n - n_whole, BoolConstant<false>{});
    flush();
  }
}

// Gradients of a block from its exponentials; `first` counts the classes before it.
template <class S, TargetKind kTarget>
FASTOPT_HD void write_block(const compute_t<S>* exps, const S* y, const TargetTerms<compute_t<S>> terms, int64_t first,
                            int64_t n, compute_t<S> factor, compute_t<S> scale, gradient_t<S>* grad) {
  using T = compute_t<S>;
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
  // Read before exponentials may take the logits' place.
  const double target_logit = kHasTarget ? static_cast<double>(load(row.logits[row.target])) : 0.0;
  alignas(64) T x_buffer[kRowBlock];
  [[maybe_unused]] alignas(64) T y_buffer[kRowBlock];
  RowLaneSums<T> lane_sums;
  for (int64_t first = 0; first < row.n_classes; first += kRowBlock) {
    const int64_t n = std::min(kRowBlock, row.n_classes - first);
    const T* x = widened(row.logits + first, n, x_buffer);
    const T* y = nullptr;
    if constexpr (!kHasTarget) y = widened(row.probabilities + first, n, y_buffer);
    const T max = max_of(x, n);
    if (max > lane_sums.max) lane_sums.template rebase<kTarget>(max);
    if constexpr (kWantsGrad) row.offsets[first / kRowBlock] = lane_sums.max;
    add_block<S, kTarget, kWantsGrad>(x, y, terms, first, n, row.logits + first + kRowBlock,
                                      kWantsGrad ? row.exps + first : nullptr, lane_sums);
  }
  RowSums<double> sums = lane_sums.total();
  if constexpr (kHasTarget) sums.q_sum = terms.spread_sum;
  const double loss =
      row_loss(sums, std::log(sums.exp_sum), terms.on, target_logit, kHasTarget, kTarget != TargetKind::kIndex);

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
        double value = block_factor * target_exp - grad_scale * terms.on;
        if constexpr (kTarget != TargetKind::kIndex) {
          value -= grad_scale * spread_q<T, kTarget>(terms, row.target, T(0));
        }
        store(grad[target], static_cast<T>(value));
      }
    }
  }
  return loss;
}

}  // namespace fastopt::cpu
