// Cross-entropy of a tile: positions side by side, one vector lane each, classes one after the other.
// Serves logits whose positions are contiguous (images), and narrow rows, transposed; both are copied into a tile
// first, for the classes of an image lie so that they would push each other out of the caches.
#pragma once

#include "cpu/cross_entropy_row.h"
#include "math/log.h"

namespace fastopt::cpu {

// Positions of a tile, so that what is found of each class stays in registers.
constexpr int64_t kTileWidth = 64;

template <class T>
struct Tile {
  T* values;               // n_classes x kTileWidth: logits, which exponentials and then gradients replace
  const T* probabilities;  // likewise, or null
  int64_t stride;          // from class to class
  int64_t n_classes;
  const int64_t* target;  // of each position, or null
  int64_t ignore_index;
  const void* ahead;     // where the logits of a later tile lie
  int64_t ahead_stride;  // from class to class, in bytes
};

template <class T>
struct TileSums {
  static constexpr int kVectors = kTileWidth / kLanes<T>;
  Lanes<T> max[kVectors];
  LaneSums<T> exp[kVectors], q[kVectors], qx[kVectors];
};

// Adds the exponentials and q of classes [first, last) to the sums.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_classes(const Tile<T>& tile, const TargetTerms<T> terms, int64_t first, int64_t last,
                            TileSums<T>& sums) {
  using V = Lanes<T>;
  constexpr int kVectors = TileSums<T>::kVectors;
  V exp_sum[kVectors] = {}, q_sum[kVectors] = {}, qx_sum[kVectors] = {};
  for (int64_t c = first; c < last; ++c) {
    T* x = tile.values + c * tile.stride;
    const char* ahead = static_cast<const char*>(tile.ahead) + c * tile.ahead_stride;
    for (int64_t i = 0; i < kTileWidth * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(ahead + i);
    [[maybe_unused]] const T* y = tile.probabilities + (has_index(kTarget) ? 0 : c * tile.stride);
    const V weight = V{} + (is_weighted(kTarget) ? terms.weight[c] : T(0));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V shifted = load_lanes(x + v * kLanes<T>) - sums.max[v];
      const V e = exp_nonpositive(shifted);
      exp_sum[v] += e;
      if constexpr (kTarget != TargetKind::kIndex) {
        V probability{};
        if constexpr (!has_index(kTarget)) probability = load_lanes(y + v * kLanes<T>);
        const V q = spread_q<kTarget>(terms, weight, probability);
        if constexpr (!has_index(kTarget)) q_sum[v] += q;
        qx_sum[v] += q * shifted;
      }
      if constexpr (kWantsGrad) store_lanes<T>(x + v * kLanes<T>, e);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    sums.exp[v].add(exp_sum[v]);
    sums.q[v].add(q_sum[v]);
    sums.qx[v].add(qx_sum[v]);
  }
}

// Writes the loss of each position to losses, 0 where it is ignored, and gradients over the tile.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES void tile_cross_entropy(const Tile<T>& tile, const TargetTerms<T> terms, double grad_scale,
                                       double* losses) {
  using V = Lanes<T>;
  constexpr bool kHasTarget = has_index(kTarget);
  constexpr int kVectors = TileSums<T>::kVectors;
  TileSums<T> sums;
  for (int v = 0; v < kVectors; ++v) sums.max[v] = V{} + std::numeric_limits<T>::lowest();
  for (int64_t c = 0; c < tile.n_classes; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V x = load_lanes(tile.values + c * tile.stride + v * kLanes<T>);
      sums.max[v] = x > sums.max[v] ? x : sums.max[v];
    }
  }

  // Read before exponentials take the logits' place.
  T target_logit[kTileWidth], target_exp[kTileWidth];
  double on[kTileWidth];
  int64_t targets[kTileWidth];  // 0 where they are ignored
  bool is_kept[kTileWidth];
  for (int64_t j = 0; j < kTileWidth; ++j) {
    is_kept[j] = !kHasTarget || tile.target[j] != tile.ignore_index;
    targets[j] = kHasTarget && is_kept[j] ? tile.target[j] : 0;
  }
  for (int64_t j = 0; kHasTarget && j < kTileWidth; ++j) {
    target_logit[j] = tile.values[targets[j] * tile.stride + j];
    on[j] = !is_kept[j] ? 0.0 : terms.weight ? terms.on * terms.weight[targets[j]] : terms.on;
  }
  for (int64_t c = 0; c < tile.n_classes; c += kSumTerms) {
    add_classes<T, kTarget, kWantsGrad>(tile, terms, c, std::min(c + kSumTerms, tile.n_classes), sums);
  }

  // What is found of each position, in vectors of double.
  double max[kTileWidth], exp_sum[kTileWidth], log_sum[kTileWidth], q_sum[kTileWidth], qx_sum[kTileWidth];
  for (int64_t j = 0; j < kTileWidth; ++j) {
    const int64_t v = j / kLanes<T>, k = j % kLanes<T>;
    max[j] = sums.max[v][k];
    exp_sum[j] = sums.exp[v].sums[k];
    q_sum[j] = kHasTarget ? terms.spread_sum : sums.q[v].sums[k];
    qx_sum[j] = sums.qx[v].sums[k];
  }
#pragma omp simd
  for (int64_t j = 0; j < kTileWidth; ++j) log_sum[j] = log_from_one(exp_sum[j]);
  for (int64_t j = 0; j < kTileWidth; ++j) {
    // A sum of 1 and more is what finite logits have; float64 has its own logarithm.
    if (std::is_same_v<T, double> || !(exp_sum[j] >= 1)) log_sum[j] = std::log(exp_sum[j]);
  }
  double exact_factor[kTileWidth];
  T factor[kTileWidth];
#pragma omp simd
  for (int64_t j = 0; j < kTileWidth; ++j) {
    const double row_on = kHasTarget ? on[j] : 0.0;
    const RowSums<double> row{max[j], exp_sum[j], q_sum[j], qx_sum[j]};
    const double loss = row_loss(row, log_sum[j], row_on, kHasTarget ? static_cast<double>(target_logit[j]) : 0.0,
                                 kHasTarget, kTarget != TargetKind::kIndex);
    losses[j] = is_kept[j] ? loss : 0.0;
    exact_factor[j] = grad_scale * (q_sum[j] + row_on) / exp_sum[j];
    factor[j] = static_cast<T>(exact_factor[j]);
  }
  if constexpr (!kWantsGrad) return;

  for (int64_t j = 0; kHasTarget && j < kTileWidth; ++j) target_exp[j] = tile.values[targets[j] * tile.stride + j];
  const T scale = static_cast<T>(grad_scale);
  for (int64_t c = 0; c < tile.n_classes; ++c) {
    T* values = tile.values + c * tile.stride;
    [[maybe_unused]] const T* y = tile.probabilities + (has_index(kTarget) ? 0 : c * tile.stride);
    const V weight = V{} + (is_weighted(kTarget) ? terms.weight[c] : T(0));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V value = load_lanes(factor + v * kLanes<T>) * load_lanes(values + v * kLanes<T>);
      if constexpr (kTarget != TargetKind::kIndex) {
        V probability{};
        if constexpr (!has_index(kTarget)) probability = load_lanes(y + v * kLanes<T>);
        value -= scale * spread_q<kTarget>(terms, weight, probability);
      }
      store_lanes<T>(values + v * kLanes<T>, value);
    }
  }
  for (int64_t j = 0; kHasTarget && j < kTileWidth; ++j) {
    double value = exact_factor[j] * target_exp[j] - grad_scale * on[j];
    if constexpr (kTarget != TargetKind::kIndex) value -= grad_scale * spread_q<T, kTarget>(terms, targets[j], T(0));
    tile.values[targets[j] * tile.stride + j] = static_cast<T>(value);
    if (!is_kept[j]) {
      for (int64_t c = 0; c < tile.n_classes; ++c) tile.values[c * tile.stride + j] = 0;
    }
  }
}

}  // namespace fastopt::cpu
