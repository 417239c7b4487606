// How the strides of logits map to the layouts that kernels read without a copy.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "losses/cross_entropy.h"

namespace fastopt {

// Sizes and strides of the positions: all dimensions but the class dimension.
struct Positions {
  c10::SmallVector<int64_t, 6> sizes, strides;
  // True if the dimensions from `first` on are one evenly strided run; sets its length and stride.
  bool collapse(size_t first, int64_t& n, int64_t& stride) const {
    n = 1;
    stride = 1;
    int64_t expected = -1;
    for (size_t i = sizes.size(); i-- > first;) {
      if (sizes[i] == 1) continue;
      if (expected < 0) {
        stride = strides[i];
      } else if (strides[i] != expected) {
        return false;
      }
      n *= sizes[i];
      expected = strides[i] * sizes[i];
    }
    return true;
  }
};

inline int64_t class_dim(size_t n_dims) { return n_dims == 1 ? 0 : 1; }

inline Positions positions_of(at::IntArrayRef sizes, at::IntArrayRef strides) {
  Positions positions;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (static_cast<int64_t>(d) == class_dim(sizes.size())) continue;
    positions.sizes.push_back(sizes[d]);
    positions.strides.push_back(strides[d]);
  }
  return positions;
}

// The layout by which a kernel reads logits of these strides without a copy, if it can.
inline std::optional<LogitLayout> layout_of(at::IntArrayRef sizes, at::IntArrayRef all_strides) {
  const int64_t dim = class_dim(sizes.size());
  const int64_t n_classes = sizes[dim];
  const int64_t class_stride = n_classes == 1 ? 1 : all_strides[dim];
  const Positions positions = positions_of(sizes, all_strides);
  int64_t n = 0, stride = 0;
  const bool is_one_run = positions.collapse(0, n, stride);
  // Rows: (N, C), channels_last images, or one row.
  if (is_one_run && class_stride == 1) return LogitLayout{n, n_classes, 1, stride, 1};
  // Columns of one image: a transposed (N, C).
  if (is_one_run && stride == 1) return LogitLayout{1, n_classes, n, 0, class_stride};
  // Columns of N images: (N, C, d1, ...).
  if (!positions.sizes.empty() && positions.collapse(1, n, stride) && stride == 1) {
    return LogitLayout{positions.sizes[0], n_classes, n, positions.strides[0], class_stride};
  }
  return std::nullopt;
}

inline std::optional<LogitLayout> layout_of(const at::Tensor& logits) {
  return layout_of(logits.sizes(), logits.strides());
}

inline bool same_kind(const LogitLayout& a, const LogitLayout& b) {
  return a.n_outer == b.n_outer && a.n_inner == b.n_inner && a.is_rows() == b.is_rows();
}

inline c10::SmallVector<int64_t, 6> strides_if_contiguous(at::IntArrayRef sizes) {
  c10::SmallVector<int64_t, 6> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

}  // namespace fastopt
