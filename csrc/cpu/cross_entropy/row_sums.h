// The sums over a wide row's classes, block by block.
#pragma once

#include <algorithm>    // min
#include <cmath>        // exp
#include <type_traits>  // is_same_v

#include "cpu/cross_entropy/row_blocks.h"
#include "cpu/lanes.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"

namespace fastopt::cpu {

// Sums over the classes, relative to max.
template <class T, TargetKind kTarget>
struct RowLaneSums {
  static constexpr bool kSumsQx = kTarget != TargetKind::kIndex;
  // The sum of uniform smoothing's q is known from the number of classes.
  static constexpr bool kSumsQ = kSumsQx && kTarget != TargetKind::kIndexUniform;
  T max = 0;  // of the first block, before anything is summed
  LaneSums<T> exp;
  LaneSumsIf<kSumsQ, T> q;
  LaneSumsIf<kSumsQx, T> qx;

  FASTOPT_HD void flush() {
    exp.flush();
    q.flush();
    qx.flush();
  }
  FASTOPT_HD RowSums<double> total() const { return {static_cast<double>(max), exp.total(), q.total(), qx.total()}; }
  // uniform_q: the sum of q so far, where smoothing is uniform.
  FASTOPT_HD void rebase(T new_max, double uniform_q) {
    const double shift = static_cast<double>(max) - static_cast<double>(new_max);
    const double factor = std::exp(shift);
    for (int64_t l = 0; l < kLanes; ++l) exp.full[l] *= factor;
    // The shift is infinite where both maxima are huge: then 0 times it would not be a number.
    if constexpr (kSumsQ) {
      for (int64_t l = 0; l < kLanes; ++l) qx.full[l] += q.full[l] != 0 ? q.full[l] * shift : 0;
    } else if constexpr (kSumsQx) {
      if (uniform_q != 0) qx.full[0] += uniform_q * shift;
    }
    max = new_max;
  }
};

// Adds the exponentials and q of kLanes classes to the sums, relative to sums.max; keeps the exponentials if a gradient
// is wanted. `first` counts the classes before them. The first n_again classes, which the group before had, are
// skipped.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_classes(const T* x, const T* y, const TargetTerms<T> terms, int64_t first, int64_t n_again, T* exps,
                            RowLaneSums<T, kTarget>& sums) {
  const T max = sums.max;
  const int32_t n_skipped = static_cast<int32_t>(n_again);
#pragma omp simd
  for (int32_t l = 0; l < kLanes; ++l) {
    const bool is_new = l >= n_skipped;
    const T shifted = x[l] - max;
    const T e = exp_nonpositive(shifted);
    sums.exp.partial[l] += is_new ? e : T(0);
    if constexpr (kWantsGrad) exps[l] = is_new ? e : exps[l];
    if constexpr (kTarget != TargetKind::kIndex) {
      const T q = smoothed_q<T, kTarget>(terms, first + l, has_index(kTarget) ? T(0) : y[l]);
      if constexpr (RowLaneSums<T, kTarget>::kSumsQ) sums.q.partial[l] += is_new ? q : T(0);
      sums.qx.partial[l] += is_new ? q * shifted : T(0);
    }
  }
}

// If a single lane holds the maximum, whose exponential is 1: adds that lane's exponentials in double. Added to the 1
// they would be rounded to its units, and the loss of a nearly certain row is their sum. The classes are [begin, end)
// of a block whose logits are x; exps holds their exponentials if a gradient is wanted. From `last` on, a class's lane
// is counted from end - kLanes.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_lane_of_max(const T* x, int64_t begin, int64_t last, int64_t end, const T* exps,
                                RowLaneSums<T, kTarget>& sums) {
  int32_t n_lanes = 0, lane = 0;
  for (int32_t l = 0; l < kLanes; ++l) {
    const bool is_large = sums.exp.partial[l] >= 1;
    n_lanes += is_large ? 1 : 0;
    lane += is_large ? l : 0;
  }
  if (n_lanes != 1) return;
  const auto exp_of = [&](int64_t i) { return kWantsGrad ? exps[i] : exp_nonpositive(x[i] - sums.max); };
  double sum = 0;
  for (int64_t i = begin + lane; i < last; i += kLanes) sum += exp_of(i);
  if (end - kLanes + lane >= last) sum += exp_of(end - kLanes + lane);
  sums.exp.partial[lane] = 0;
  sums.exp.full[lane] += sum;
}

// add_classes of a block, whose logits are x in the compute type. Calls before(i, m) for each group of m classes from
// i. Where the target may have the maximum, the others' sum is kept exact; the loss of another target is log 2 or more.
template <class S, TargetKind kTarget, bool kWantsGrad, class F>
FASTOPT_HD void add_block(const S* logits, const compute_t<S>* x, const compute_t<S>* y,
                          const TargetTerms<compute_t<S>> terms, int64_t first, int64_t n, compute_t<S>* exps,
                          RowLaneSums<compute_t<S>, kTarget>& sums, bool may_be_target, F&& before) {
  using T = compute_t<S>;
  const auto add = [&](int64_t i, int64_t n_again) __attribute__((always_inline)) {
    add_classes<T, kTarget, kWantsGrad>(x + i, y + (has_index(kTarget) ? 0 : i), terms, first + i, n_again,
                                        exps + (kWantsGrad ? i : 0), sums);
  };
  for (int64_t part = 0; part < n; part += kSumTerms * kLanes) {
    const int64_t end = std::min(part + kSumTerms * kLanes, n), last = end - (end - part) % kLanes;
    for_groups(logits, part, last, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      before(i, m);
      add(i, 0);
    });
    if (last < end) {
      before(last, end - last);
      add(end - kLanes, last - (end - kLanes));
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (may_be_target) add_lane_of_max<T, kTarget, kWantsGrad>(x, part, last, end, exps, sums);
    }
    sums.flush();
  }
}

}  // namespace fastopt::cpu
