// Cross-entropy of a tile: many positions side by side, one vector lane each, classes one after the other.
// Serves logits whose positions are contiguous (images), and narrow rows once they are transposed into a tile.
#pragma once

#include "cpu/cross_entropy_row.h"

namespace fastopt::cpu {

constexpr int64_t kMaxTileWidth = 256;
// Classes summed in the compute type before the sum moves to double.
constexpr int64_t kTileClassBlock = 16;

template <class T>
struct Tile {
  const T* logits;         // n_classes x width, logit_stride apart
  const T* probabilities;  // likewise, or null
  T* grad;                 // likewise; may be logits
  int64_t logit_stride, probability_stride, grad_stride;
  int64_t n_classes, width;
  const int64_t* target;  // of each position, or null
  int64_t ignore_index;
};

template <class T>
struct TileSums {
  alignas(64) T max[kMaxTileWidth];
  alignas(64) double exp_sum[kMaxTileWidth];
  alignas(64) double q_sum[kMaxTileWidth];
  alignas(64) double qx_sum[kMaxTileWidth];
  alignas(64) T factor[kMaxTileWidth];
  double exact_factor[kMaxTileWidth];
};

template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_classes(const Tile<T>& tile, const TargetTerms<T> terms, int64_t first, int64_t last,
                            TileSums<T>& sums) {
  alignas(64) T exp_sum[kMaxTileWidth] = {}, q_sum[kMaxTileWidth] = {}, qx_sum[kMaxTileWidth] = {};
  const int64_t width = tile.width;
  for (int64_t c = first; c < last; ++c) {
    const T* x = tile.logits + c * tile.logit_stride;
    [[maybe_unused]] const T* y = tile.probabilities + c * tile.probability_stride;
    [[maybe_unused]] T* exps = tile.grad + c * tile.grad_stride;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const T shifted = x[j] - sums.max[j];
      const T e = exp_nonpositive(shifted);
      exp_sum[j] += e;
      if constexpr (kTarget != TargetKind::kIndex) {
        const T q = spread_q<T, kTarget>(terms, c, has_index(kTarget) ? T(0) : y[j]);
        if constexpr (!has_index(kTarget)) q_sum[j] += q;
        qx_sum[j] += q * shifted;
      }
      if constexpr (kWantsGrad) exps[j] = e;
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    sums.exp_sum[j] += exp_sum[j];
    sums.q_sum[j] += q_sum[j];
    sums.qx_sum[j] += qx_sum[j];
  }
}

// Writes the loss of each position to losses, 0 where it is ignored, and the gradient over the exponentials.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES void tile_cross_entropy(const Tile<T>& tile, const TargetTerms<T> terms, double grad_scale,
                                       double* losses) {
  constexpr bool kHasTarget = has_index(kTarget);
  TileSums<T> sums;
  const int64_t width = tile.width;
  for (int64_t j = 0; j < width; ++j) {
    sums.max[j] = std::numeric_limits<T>::lowest();
    sums.exp_sum[j] = sums.q_sum[j] = sums.qx_sum[j] = 0;
  }
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    const T* x = tile.logits + c * tile.logit_stride;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sums.max[j] = x[j] > sums.max[j] ? x[j] : sums.max[j];
  }

  // Read before exponentials may take the logits' place.
  alignas(64) T target_logit[kMaxTileWidth], target_exp[kMaxTileWidth];
  double on[kMaxTileWidth];
  for (int64_t j = 0; kHasTarget && j < width; ++j) {
    const bool is_kept = tile.target[j] != tile.ignore_index;
    const int64_t t = is_kept ? tile.target[j] : 0;
    target_logit[j] = tile.logits[t * tile.logit_stride + j];
    on[j] = !is_kept ? 0.0 : terms.weight ? terms.on * terms.weight[t] : terms.on;
  }
  for (int64_t c = 0; c < tile.n_classes; c += kTileClassBlock) {
    add_classes<T, kTarget, kWantsGrad>(tile, terms, c, std::min(c + kTileClassBlock, tile.n_classes), sums);
  }
  for (int64_t j = 0; j < width; ++j) {
    const bool is_kept = !kHasTarget || tile.target[j] != tile.ignore_index;
    const double q_sum = kHasTarget ? terms.spread_sum : sums.q_sum[j];
    const RowSums<double> row{static_cast<double>(sums.max[j]), sums.exp_sum[j], q_sum, sums.qx_sum[j]};
    losses[j] = !is_kept
                    ? 0.0
                    : row_loss(row, kHasTarget ? on[j] : 0.0, kHasTarget ? static_cast<double>(target_logit[j]) : 0.0,
                               kHasTarget, kTarget != TargetKind::kIndex);
    if constexpr (kWantsGrad) {
      sums.exact_factor[j] = (grad_scale * (q_sum + (kHasTarget ? on[j] : 0.0)) / row.exp_sum);
      sums.factor[j] = static_cast<T>(sums.exact_factor[j]);
      if (kHasTarget && is_kept) target_exp[j] = tile.grad[tile.target[j] * tile.grad_stride + j];
    }
  }
  if constexpr (!kWantsGrad) return;

  const T scale = static_cast<T>(grad_scale);
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    [[maybe_unused]] const T* y = tile.probabilities + c * tile.probability_stride;
    T* grad = tile.grad + c * tile.grad_stride;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      T value = sums.factor[j] * grad[j];
      if constexpr (kTarget != TargetKind::kIndex) {
        value -= scale * spread_q<T, kTarget>(terms, c, has_index(kTarget) ? T(0) : y[j]);
      }
      grad[j] = value;
    }
  }
  for (int64_t j = 0; kHasTarget && j < width; ++j) {
    if (tile.target[j] != tile.ignore_index) {
      const int64_t t = tile.target[j];
      double value = sums.exact_factor[j] * target_exp[j] - grad_scale * on[j];
      if constexpr (kTarget != TargetKind::kIndex) value -= grad_scale * spread_q<T, kTarget>(terms, t, T(0));
      tile.grad[t * tile.grad_stride + j] = static_cast<T>(value);
    } else {
      for (int64_t c = 0; c < tile.n_classes; ++c) tile.grad[c * tile.grad_stride + j] = 0;
    }
  }
}

// Copies n_classes x width elements, converting: (c, j) from `from[c * from_class + j * from_position]`.
template <class To, class From>
FASTOPT_CLONES void copy_tile(const From* from, int64_t from_class, int64_t from_position, To* to, int64_t to_class,
                              int64_t to_position, int64_t n_classes, int64_t width) {
  if (from_position == 1 && to_position == 1) {
    for (int64_t c = 0; c < n_classes; ++c) {
      for (int64_t j = 0; j < width; ++j)
        store(to[c * to_class + j], static_cast<compute_t<To>>(load(from[c * from_class + j])));
    }
    return;
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t c = 0; c < n_classes; ++c) {
      store(to[c * to_class + j * to_position],
            static_cast<compute_t<To>>(load(from[c * from_class + j * from_position])));
    }
  }
}

}  // namespace fastopt::cpu
