// Cross-entropy of a tile: a vector lane for each position, classes one after the other. Serves logits whose positions
// are contiguous (images) and narrow rows, transposed. Both are copied into a tile first, because the classes of an
// image are a large stride apart and would evict each other from the caches.
#pragma once

#include <algorithm>  // min
#include <limits>     // numeric_limits

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"
#include "math/log.h"

namespace fastopt::cpu {

// Positions of a tile: the lanes of its sums. Few positions are divided into narrow tiles, at most three.
constexpr int64_t kTileWidth = kLanes, kNarrowTileWidth = 16;

// The width of the tile that takes the first of n positions.
FASTOPT_HD int64_t tile_width(int64_t n) { return n <= 3 * kNarrowTileWidth ? kNarrowTileWidth : kTileWidth; }

template <class T>
struct Tile {
  T* values;               // n_classes x width: logits, overwritten by exponentials and then by gradients
  const T* probabilities;  // n_classes x width, or null
  int64_t stride;          // from class to class
  int64_t n_classes;
  int64_t n_positions;    // the others' losses are not summed
  const int64_t* target;  // of each position, a class or ignore_index; or null
  int64_t ignore_index;
  const void* prefetch;     // the logits of a later tile
  int64_t prefetch_stride;  // from class to class, in bytes
};

template <class T, TargetKind kTarget, int64_t kWidth>
struct TileSums {
  alignas(64) T max[kWidth];
  LaneSums<T, kWidth> exp;
  LaneSumsIf<!has_index(kTarget), T, kWidth> q;
  LaneSumsIf<kTarget != TargetKind::kIndex, T, kWidth> qx;
};

// Adds the exponentials and q of class c to the sums; overwrites the logits with the exponentials.
template <class T, TargetKind kTarget, int64_t kWidth>
FASTOPT_HD void add_class(const Tile<T>& tile, const TargetTerms<T> terms, int64_t c,
                          TileSums<T, kTarget, kWidth>& sums) {
  const char* prefetch = static_cast<const char*>(tile.prefetch) + c * tile.prefetch_stride;
  for (int64_t i = 0; i < kWidth * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(prefetch + i);
  T* x = tile.values + c * tile.stride;
  [[maybe_unused]] const T* y = tile.probabilities + (has_index(kTarget) ? 0 : c * tile.stride);
#pragma omp simd
  for (int64_t j = 0; j < kWidth; ++j) {
    const T shifted = x[j] - sums.max[j];
    const T e = exp_nonpositive(shifted);
    sums.exp.partial[j] += e;
    if constexpr (kTarget != TargetKind::kIndex) {
      const T q = smoothed_q<T, kTarget>(terms, c, has_index(kTarget) ? T(0) : y[j]);
      if constexpr (!has_index(kTarget)) sums.q.partial[j] += q;
      sums.qx.partial[j] += q * shifted;
    }
    x[j] = e;
  }
}

constexpr int64_t kTermsBelowMax = 4 * kSumTerms;  // terms that are summed in the compute type
constexpr double kMostlyMax = 1.25;                // a sum below this is mostly the maximum's 1

// Sums again, without the maximum's exponential of 1, where that is most of the sum and the target may have the
// maximum: the others were rounded to the 1's units, though the loss of a nearly certain row is their sum. The loss of
// another target is log 2 or more. target_logit: of each position, or null.
template <int64_t kWidth, class T>
FASTOPT_HD void sum_below_max(const Tile<T>& tile, const T* max, const T* target_logit, double* exp_sum) {
  int64_t is_mostly_max[kWidth], n_needed = 0;
#pragma omp simd reduction(+ : n_needed)
  for (int64_t j = 0; j < kWidth; ++j) {
    const bool may_be_target = !target_logit || target_logit[j] == max[j];
    is_mostly_max[j] = may_be_target && exp_sum[j] >= 1 && exp_sum[j] < kMostlyMax;  // below 1: no logit is finite
    n_needed += is_mostly_max[j];
  }
  if (n_needed == 0) return;
  double rest[kWidth] = {};
  for (int64_t begin = 0; begin < tile.n_classes; begin += kTermsBelowMax) {
    const int64_t end = std::min(begin + kTermsBelowMax, tile.n_classes);
    alignas(64) T below[kWidth] = {};
    for (int64_t c = begin; c < end; ++c) {
      const T* e = tile.values + c * tile.stride;
#pragma omp simd
      for (int64_t j = 0; j < kWidth; ++j) below[j] += e[j] < 1 ? e[j] : T(0);
    }
    for (int64_t j = 0; j < kWidth; ++j) rest[j] += below[j];
  }
  for (int64_t j = 0; j < kWidth; ++j) exp_sum[j] = is_mostly_max[j] ? 1 + rest[j] : exp_sum[j];
}

// The largest logit of each position.
template <int64_t kWidth, class T>
FASTOPT_HD void find_max(const Tile<T>& tile, T* result) {
  alignas(64) T max[kWidth];  // which stays in registers
  for (int64_t j = 0; j < kWidth; ++j) max[j] = std::numeric_limits<T>::lowest();
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    const T* x = tile.values + c * tile.stride;
#pragma omp simd
    for (int64_t j = 0; j < kWidth; ++j) max[j] = x[j] > max[j] ? x[j] : max[j];
  }
  for (int64_t j = 0; j < kWidth; ++j) result[j] = max[j];
}

// Gradients of ignored positions, whose logits may be no numbers.
template <int64_t kWidth, class T>
FASTOPT_HD void zero_ignored(const Tile<T>& tile, const int64_t* is_kept) {
  T kept[kWidth];  // as wide as the numbers beside it
  int64_t n_kept = 0;
  for (int64_t j = 0; j < kWidth; ++j) {
    kept[j] = static_cast<T>(is_kept[j]);
    n_kept += is_kept[j];
  }
  if (n_kept == kWidth) return;
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    T* values = tile.values + c * tile.stride;
#pragma omp simd
    for (int64_t j = 0; j < kWidth; ++j) values[j] = kept[j] != 0 ? values[j] : T(0);
  }
}

// Writes the loss of each position to losses, 0 where it is ignored, and gradients over the tile; returns the losses'
// sum.
template <class T, TargetKind kTarget, bool kWantsGrad, int64_t kWidth>
FASTOPT_CLONES double tile_cross_entropy(const Tile<T>& tile, const TargetTerms<T> terms, double grad_scale,
                                         double* losses) {
  constexpr bool kHasTarget = has_index(kTarget);
  TileSums<T, kTarget, kWidth> sums;
  find_max<kWidth>(tile, sums.max);

  // Read before exponentials overwrite the logits.
  T target_logit[kWidth], target_exp[kWidth];
  double on[kWidth];
  int64_t targets[kWidth];  // 0 where they are ignored
  int64_t is_kept[kWidth];  // as wide as the numbers beside it, or the loops would not be vectors
  for (int64_t j = 0; j < kWidth; ++j) {
    is_kept[j] = !kHasTarget || tile.target[j] != tile.ignore_index;
    targets[j] = kHasTarget && is_kept[j] ? tile.target[j] : 0;
  }
  for (int64_t j = 0; kHasTarget && j < kWidth; ++j) {
    target_logit[j] = tile.values[targets[j] * tile.stride + j];
    on[j] = !is_kept[j] ? 0.0 : terms.weight ? terms.on * terms.weight[targets[j]] : terms.on;
  }
  for (int64_t part = 0; part < tile.n_classes; part += kSumTerms) {
    const int64_t end = std::min(part + kSumTerms, tile.n_classes);
    for (int64_t c = part; c < end; ++c) add_class<T, kTarget, kWidth>(tile, terms, c, sums);
    sums.exp.flush();
    sums.q.flush();
    sums.qx.flush();
  }

  // Results of each position, in vectors of double.
  double* exp_sum = sums.exp.full;
  double log_sum[kWidth];
  if constexpr (!std::is_same_v<T, double>) {
    sum_below_max<kWidth>(tile, sums.max, kHasTarget ? target_logit : nullptr, exp_sum);
  }
  int64_t n_not_finite = 0;  // of positions, with such a logit
#pragma omp simd reduction(+ : n_not_finite)
  for (int64_t j = 0; j < kWidth; ++j) {
    log_sum[j] = log_from_one(exp_sum[j]);
    n_not_finite += exp_sum[j] >= 1 ? 0 : 1;
  }
  for (int64_t j = 0; n_not_finite > 0 && j < kWidth; ++j) {
    if (!(exp_sum[j] >= 1)) log_sum[j] = std::log(exp_sum[j]);
  }
  double exact_factor[kWidth];
  T factor[kWidth];
#pragma omp simd
  for (int64_t j = 0; j < kWidth; ++j) {
    const double row_on = kHasTarget ? on[j] : 0.0;
    const double q_sum = kHasTarget ? terms.smoothed_sum : sums.q.of_lane(j);
    const RowSums<double> row{static_cast<double>(sums.max[j]), exp_sum[j], q_sum, sums.qx.of_lane(j)};
    const double loss = row_loss(row, log_sum[j], row_on, kHasTarget ? static_cast<double>(target_logit[j]) : 0.0,
                                 kHasTarget, kTarget != TargetKind::kIndex);
    losses[j] = is_kept[j] ? loss : 0.0;
    exact_factor[j] = grad_scale * (q_sum + row_on) / exp_sum[j];
    factor[j] = static_cast<T>(exact_factor[j]);
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kWidth; ++j) sum += j < tile.n_positions ? losses[j] : 0.0;
  if constexpr (!kWantsGrad) return sum;

  for (int64_t j = 0; kHasTarget && j < kWidth; ++j) target_exp[j] = tile.values[targets[j] * tile.stride + j];
  const T scale = static_cast<T>(grad_scale);
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    T* values = tile.values + c * tile.stride;
    [[maybe_unused]] const T* y = tile.probabilities + (has_index(kTarget) ? 0 : c * tile.stride);
#pragma omp simd
    for (int64_t j = 0; j < kWidth; ++j) {
      values[j] = class_gradient<T, kTarget>(values[j], factor[j], scale, terms, c, has_index(kTarget) ? T(0) : y[j]);
    }
  }
  for (int64_t j = 0; kHasTarget && j < kWidth; ++j) {
    const double value =
        target_gradient<T, kTarget>(target_exp[j], exact_factor[j], grad_scale, terms, on[j], targets[j]);
    tile.values[targets[j] * tile.stride + j] = static_cast<T>(value);
  }
  if constexpr (kHasTarget) zero_ignored<kWidth>(tile, is_kept);
  return sum;
}

}  // namespace fastopt::cpu
