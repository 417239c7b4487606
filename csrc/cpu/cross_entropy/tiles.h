// Positions as adjacent tiles: copied in, computed, and their gradients copied out.
#pragma once

#include <algorithm>  // fill, min

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/tile.h"
#include "cpu/cross_entropy/tile_copies.h"
#include "cpu/lanes.h"
#include "cpu/scratch.h"

namespace fastopt::cpu {

// Computes `n` positions from `first` on as adjacent tiles; returns the sum of their losses.
template <class S, TargetKind kTarget, bool kWantsGrad>
double run_tiles(CrossEntropyCall& call, int64_t first, int64_t n) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = call.problem;
  const LogitLayout& layout = p.logits_layout;
  const int64_t n_classes = layout.n_classes;

  // Lanes past the last position compute on zeros, so that no vector is left to a scalar loop.
  const int64_t n_wide = n / kTileWidth * kTileWidth, last = tile_width(n - n_wide);
  const int64_t width = n_wide + divide_up(n - n_wide, last) * last;
  T* buffer = layout.is_rows() ? scratch<T>(n_classes * width, 0) : nullptr;
  const auto read = [&](const void* from, const LogitLayout& from_layout, int slot) {
    T* to = scratch<T>(n_classes * width, slot);
    read_tile(static_cast<const S*>(from), {from_layout, first, n}, to, width, buffer);
    return to;
  };
  T* values = read(p.logits, layout, 1);
  const T* probabilities = has_index(kTarget) ? nullptr : read(p.probabilities, p.probabilities_layout, 2);
  const PositionRange next{layout, first + n, n};
  CompensatedSum sum;
  for (int64_t i = 0; i < n; i += tile_width(n - i)) {
    Tile<T> tile{};
    tile.values = values + i;
    tile.stride = width;
    tile.n_classes = n_classes;
    tile.ignore_index = p.ignore_index;
    tile.prefetch = static_cast<const S*>(p.logits) + next.offset(i);
    // The logits of rows are contiguous: with each class, as many are prefetched as the tile has positions.
    tile.prefetch_stride = (layout.is_rows() ? kTileWidth : layout.class_stride) * static_cast<int64_t>(sizeof(S));
    tile.n_positions = std::min(tile_width(n - i), n - i);
    int64_t targets[kTileWidth];
    if constexpr (has_index(kTarget)) {
      call.read_targets(first + i, tile.n_positions, targets);
      std::fill(targets + tile.n_positions, targets + kTileWidth, p.ignore_index);
      tile.target = targets;
    } else {
      tile.probabilities = probabilities + i;
    }
    double losses[kTileWidth];
    const auto terms = target_terms<T>(p);
    sum.add(with_bool(tile_width(n - i) == kTileWidth, [&](auto is_wide) {
      constexpr int64_t kWidth = decltype(is_wide)::value ? kTileWidth : kNarrowTileWidth;
      return tile_cross_entropy<T, kTarget, kWantsGrad, kWidth>(tile, terms, p.grad_scale, losses);
    }));
    for (int64_t j = 0; p.losses && j < tile.n_positions; ++j) store_loss<S>(p, first + i + j, losses[j]);
  }
  if constexpr (kWantsGrad) {
    write_tile(values, width, static_cast<gradient_t<S>*>(p.grad), {p.grad_layout, first, n}, buffer, call.streams);
  }
  return sum.total();
}

}  // namespace fastopt::cpu
