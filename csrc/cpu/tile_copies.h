// Between logits as they lie and a tile, in which the positions of a class are side by side.
#pragma once

#include <algorithm>    // min
#include <type_traits>  // is_same_v

#include "common.h"
#include "cpu/isa.h"
#include "cpu/line_writer.h"

namespace fastopt::cpu {

// Where the logits of `n` positions lie: (class c, position j) at c * class_stride + j * position_stride.
struct TileView {
  int64_t class_stride, position_stride;
  int64_t n_classes, n;
};

// 4 x 4 numbers of 4 bytes, in registers that every x86-64 and AArch64 has.
FASTOPT_HD void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  Four a, b, c, d;
  memcpy(&a, from, sizeof(a));
  memcpy(&b, from + from_stride, sizeof(b));
  memcpy(&c, from + 2 * from_stride, sizeof(c));
  memcpy(&d, from + 3 * from_stride, sizeof(d));
  const Four ac_low = __builtin_shufflevector(a, c, 0, 4, 1, 5), ac_high = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  const Four bd_low = __builtin_shufflevector(b, d, 0, 4, 1, 5), bd_high = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5);
  b = __builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7);
  c = __builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5);
  d = __builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7);
  memcpy(to, &a, sizeof(a));
  memcpy(to + to_stride, &b, sizeof(b));
  memcpy(to + 2 * to_stride, &c, sizeof(c));
  memcpy(to + 3 * to_stride, &d, sizeof(d));
}

// to[j][i] = from[i][j] for i < n, j < m.
template <class T>
FASTOPT_HD void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n, int64_t m) {
  if constexpr (std::is_same_v<T, float>) {
    if (n >= 4 && m >= 4) {
      // The last block of a line begins early, where it must, and writes some numbers again.
      for (int64_t i = 0; i < n; i += 4) {
        const int64_t row = i + 4 <= n ? i : n - 4;
        for (int64_t j = 0; j < m; j += 4) {
          const int64_t column = j + 4 <= m ? j : m - 4;
          transpose_4x4(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
        }
      }
      return;
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = 0; i < n; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

template <class To, class From>
FASTOPT_HD void convert(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to[i], static_cast<compute_t<To>>(load(from[i])));
}

// Runs of n numbers, each a stride after the other: as one where they are side by side.
template <class To, class From>
FASTOPT_HD void convert_runs(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n_runs,
                             int64_t n) {
  if (from_stride == n && to_stride == n) return convert(from, to, n_runs * n);
  for (int64_t i = 0; i < n_runs; ++i) convert(from + i * from_stride, to + i * to_stride, n);
}

// A run of numbers, past the caches if it streams.
template <class To, class From>
FASTOPT_HD void write_run(const From* from, To* to, int64_t n, bool streams) {
  if (!streams) return convert(from, to, n);
  constexpr int64_t kGroup = 256;
  LineWriter<To, kGroup> lines;
  lines.begin(to, true);
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t m = std::min(kGroup, n - i);
    convert(from + i, lines.space(i), m);
    lines.write(i, m);
  }
  lines.end(n);
}

// Fills a tile of `width` positions; those past the view's are 0. `buffer` holds n * n_classes numbers.
template <class S>
FASTOPT_CLONES void read_tile(const S* from, const TileView& view, compute_t<S>* to, int64_t width,
                              compute_t<S>* buffer) {
  using T = compute_t<S>;
  if (view.n < width) memset(to, 0, view.n_classes * width * sizeof(T));
  if (view.position_stride == 1) {
    convert_runs(from, view.class_stride, to, width, view.n_classes, view.n);
    return;
  }
  if constexpr (std::is_same_v<S, T>) {
    transpose(from, view.position_stride, to, width, view.n, view.n_classes);
  } else {
    convert_runs(from, view.position_stride, buffer, view.n_classes, view.n, view.n_classes);
    transpose(buffer, view.n_classes, to, width, view.n, view.n_classes);
  }
}

// The other way round, without the positions past the view's.
template <class T, class G>
FASTOPT_CLONES void write_tile(const T* from, int64_t width, G* to, const TileView& view, T* buffer, bool streams) {
  if (view.position_stride == 1) {
    for (int64_t c = 0; c < view.n_classes; ++c) {
      write_run(from + c * width, to + c * view.class_stride, view.n, streams);
    }
    return;
  }
  if constexpr (std::is_same_v<T, G>) {
    if (!streams) return transpose(from, width, to, view.position_stride, view.n_classes, view.n);
  }
  transpose(from, width, buffer, view.n_classes, view.n_classes, view.n);
  if (view.position_stride == view.n_classes) return write_run(buffer, to, view.n * view.n_classes, streams);
  convert_runs(buffer, view.n_classes, to, view.position_stride, view.n, view.n_classes);
}

}  // namespace fastopt::cpu
