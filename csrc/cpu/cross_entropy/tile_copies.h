// Copies between logits in their own layout and a tile, in which the positions of a class are contiguous.
#pragma once

#include <algorithm>    // min
#include <type_traits>  // is_same_v

#include "common.h"
#include "cpu/isa.h"
#include "cpu/line_writer.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// Images of up to this many positions share a tile, as many as it has room for.
constexpr int64_t kMaxShortRun = 32;
constexpr int64_t kBlockClasses = 64;  // classes of such images that are copied at once

// The positions [first, first + n), counted over all images. A row is an image of one position.
struct PositionRange {
  LogitLayout layout;
  int64_t first, n;

  // Offset of the range's position j.
  FASTOPT_HD int64_t offset(int64_t j) const {
    const int64_t outer = (first + j) / layout.n_inner;
    return outer * layout.outer_stride + (first + j - outer * layout.n_inner);
  }
  // Calls f(j, m, offset) for each contiguous run of m positions, from position j on.
  template <class F>
  FASTOPT_HD void for_runs(F&& f) const {
    for (int64_t j = 0; j < n;) {
      const int64_t m = std::min(n - j, layout.n_inner - (first + j) % layout.n_inner);
      f(j, m, offset(j));
      j += m;
    }
  }
};

// Blocks of numbers are transposed in registers that every x86-64 and AArch64 has.
typedef float FourFloats __attribute__((vector_size(16)));
typedef double TwoDoubles __attribute__((vector_size(16)));

template <class V, class T>
FASTOPT_HD V load_vector(const T* from) {
  V vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <class V, class T>
FASTOPT_HD void store_vector(V vector, T* to) {
  memcpy(to, &vector, sizeof(vector));
}

template <int64_t kN, int64_t kM, class T>
struct TransposedBlock;

template <>
struct TransposedBlock<4, 4, float> {
  FASTOPT_HD static void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    const auto a = load_vector<FourFloats>(from), b = load_vector<FourFloats>(from + from_stride);
    const auto c = load_vector<FourFloats>(from + 2 * from_stride), d = load_vector<FourFloats>(from + 3 * from_stride);
    const auto ac_low = __builtin_shufflevector(a, c, 0, 4, 1, 5), ac_high = __builtin_shufflevector(a, c, 2, 6, 3, 7);
    const auto bd_low = __builtin_shufflevector(b, d, 0, 4, 1, 5), bd_high = __builtin_shufflevector(b, d, 2, 6, 3, 7);
    store_vector(__builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5), to);
    store_vector(__builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7), to + to_stride);
    store_vector(__builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5), to + 2 * to_stride);
    store_vector(__builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7), to + 3 * to_stride);
  }
};

// Two numbers of 4 bytes are moved as one of 8.
template <>
struct TransposedBlock<4, 2, float> {
  FASTOPT_HD static void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    const auto pair = [&](int64_t i) { return load_vector<double>(from + i * from_stride); };
    const auto a = bit_cast<FourFloats>(TwoDoubles{pair(0), pair(1)});
    const auto b = bit_cast<FourFloats>(TwoDoubles{pair(2), pair(3)});
    store_vector(__builtin_shufflevector(a, b, 0, 2, 4, 6), to);
    store_vector(__builtin_shufflevector(a, b, 1, 3, 5, 7), to + to_stride);
  }
};

template <>
struct TransposedBlock<2, 4, float> {
  FASTOPT_HD static void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    const auto a = load_vector<FourFloats>(from), b = load_vector<FourFloats>(from + from_stride);
    const auto low = bit_cast<TwoDoubles>(__builtin_shufflevector(a, b, 0, 4, 1, 5));
    const auto high = bit_cast<TwoDoubles>(__builtin_shufflevector(a, b, 2, 6, 3, 7));
    store_vector(low[0], to);
    store_vector(low[1], to + to_stride);
    store_vector(high[0], to + 2 * to_stride);
    store_vector(high[1], to + 3 * to_stride);
  }
};

template <>
struct TransposedBlock<2, 2, double> {
  FASTOPT_HD static void copy(const double* from, int64_t from_stride, double* to, int64_t to_stride) {
    const auto a = load_vector<TwoDoubles>(from), b = load_vector<TwoDoubles>(from + from_stride);
    store_vector(__builtin_shufflevector(a, b, 0, 2), to);
    store_vector(__builtin_shufflevector(a, b, 1, 3), to + to_stride);
  }
};

// Block by block. The last block of a line starts early where the line is no multiple of a block: it rewrites numbers.
template <int64_t kN, int64_t kM, class T>
FASTOPT_HD void transpose_blocks(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n, int64_t m) {
  for (int64_t i = 0; i < n; i += kN) {
    const int64_t row = std::min(i, n - kN);
    for (int64_t j = 0; j < m; j += kM) {
      const int64_t column = std::min(j, m - kM);
      TransposedBlock<kN, kM, T>::copy(from + row * from_stride + column, from_stride, to + column * to_stride + row,
                                       to_stride);
    }
  }
}

// to[j][i] = from[i][j] for i < n, j < m.
template <class T>
FASTOPT_HD void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n, int64_t m) {
  if constexpr (std::is_same_v<T, float>) {
    if (n >= 4 && m >= 4) return transpose_blocks<4, 4>(from, from_stride, to, to_stride, n, m);
    if (n >= 4 && m >= 2) return transpose_blocks<4, 2>(from, from_stride, to, to_stride, n, m);
    if (n >= 2 && m >= 4) return transpose_blocks<2, 4>(from, from_stride, to, to_stride, n, m);
  } else {
    if (n >= 2 && m >= 2) return transpose_blocks<2, 2>(from, from_stride, to, to_stride, n, m);
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = 0; i < n; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

template <class To, class From>
FASTOPT_HD void convert(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    memcpy(static_cast<void*>(to), from, n * sizeof(To));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(to[i], static_cast<compute_t<To>>(load(from[i])));
  }
}

// Runs of n numbers, kStep <= n <= 2 * kStep, in two steps that may overlap: each is a few moves of vectors.
template <int64_t kStep, class T>
FASTOPT_HD void copy_runs_by(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n_runs, int64_t n) {
  for (int64_t i = 0; i < n_runs; ++i, from += from_stride, to += to_stride) {
    convert(from, to, kStep);
    if (n > kStep) convert(from + n - kStep, to + n - kStep, kStep);
  }
}

// Runs of n <= kMaxShortRun numbers, a stride apart.
template <class T>
FASTOPT_HD void copy_short_runs(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n_runs,
                                int64_t n) {
  if (n >= 16) return copy_runs_by<16>(from, from_stride, to, to_stride, n_runs, n);
  if (n >= 8) return copy_runs_by<8>(from, from_stride, to, to_stride, n_runs, n);
  if (n >= 4) return copy_runs_by<4>(from, from_stride, to, to_stride, n_runs, n);
  if (n >= 2) return copy_runs_by<2>(from, from_stride, to, to_stride, n_runs, n);
  copy_runs_by<1>(from, from_stride, to, to_stride, n_runs, n);
}

// The same to another type. Many runs are converted as one: a single run would not fill a vector.
template <class To, class From>
FASTOPT_HD void convert_short_runs(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n_runs,
                                   int64_t n) {
  constexpr int64_t kNumbers = 1024;
  const int64_t n_together = kNumbers / n;
  for (int64_t i = 0; i < n_runs; i += n_together, from += n_together * from_stride, to += n_together * to_stride) {
    const int64_t m = std::min(n_together, n_runs - i);
    From unconverted[kNumbers];
    To converted[kNumbers];
    if (from_stride != n) copy_short_runs(from, from_stride, unconverted, n, m, n);
    convert(from_stride == n ? from : unconverted, to_stride == n ? to : converted, m * n);
    if (to_stride != n) copy_short_runs(converted, n, to, to_stride, m, n);
  }
}

// Runs of n numbers, a stride apart; converted as one where they are contiguous.
template <class To, class From>
FASTOPT_HD void convert_runs(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n_runs,
                             int64_t n) {
  if (from_stride == n && to_stride == n) return convert(from, to, n_runs * n);
  if (n > kMaxShortRun) {
    for (int64_t i = 0; i < n_runs; ++i) convert(from + i * from_stride, to + i * to_stride, n);
  } else if constexpr (std::is_same_v<To, From>) {
    copy_short_runs(from, from_stride, to, to_stride, n_runs, n);
  } else {
    convert_short_runs(from, from_stride, to, to_stride, n_runs, n);
  }
}

// A run of numbers, written past the caches if it streams.
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

// Calls f(first class, number of classes, position, offset of its image) for each block of whole images.
template <class F>
FASTOPT_HD void for_short_blocks(const PositionRange& range, F&& f) {
  for (int64_t c = 0; c < range.layout.n_classes; c += kBlockClasses) {
    const int64_t n_classes = std::min(kBlockClasses, range.layout.n_classes - c);
    int64_t offset = range.offset(0) + c * range.layout.class_stride;
    for (int64_t j = 0; j < range.n; j += range.layout.n_inner, offset += range.layout.outer_stride) {
      f(c, n_classes, j, offset);
    }
  }
}

// Fills a tile of `width` positions; those beyond the range are 0. `buffer` holds n * n_classes numbers, for rows.
template <class S>
FASTOPT_CLONES void read_tile(const S* from, const PositionRange& range, compute_t<S>* to, int64_t width,
                              compute_t<S>* buffer) {
  using T = compute_t<S>;
  const LogitLayout layout = range.layout;
  const int64_t n_classes = layout.n_classes, n_inner = layout.n_inner, stride = layout.class_stride;
  if (range.n < width) memset(to, 0, n_classes * width * sizeof(T));
  if (layout.is_rows()) {
    from += range.offset(0);
    if constexpr (std::is_same_v<S, T>) {
      transpose(from, layout.outer_stride, to, width, range.n, n_classes);
    } else {
      convert_runs(from, layout.outer_stride, buffer, n_classes, range.n, n_classes);
      transpose(buffer, n_classes, to, width, range.n, n_classes);
    }
  } else if (n_inner <= kMaxShortRun) {
    for_short_blocks(range, [&](int64_t c, int64_t n, int64_t j, int64_t offset) __attribute__((always_inline)) {
      convert_runs(from + offset, stride, to + c * width + j, width, n, n_inner);
    });
  } else {
    range.for_runs([&](int64_t j, int64_t m, int64_t offset) __attribute__((always_inline)) {
      convert_runs(from + offset, stride, to + j, width, n_classes, m);
    });
  }
}

// Writes a tile back, without the positions beyond the range.
template <class T, class G>
FASTOPT_CLONES void write_tile(const T* from, int64_t width, G* to, const PositionRange& range, T* buffer,
                               bool streams) {
  const LogitLayout layout = range.layout;
  const int64_t n_classes = layout.n_classes, n_inner = layout.n_inner, stride = layout.class_stride;
  if (layout.is_rows()) {
    to += range.offset(0);
    if constexpr (std::is_same_v<T, G>) {
      if (!streams) return transpose(from, width, to, layout.outer_stride, n_classes, range.n);
    }
    transpose(from, width, buffer, n_classes, n_classes, range.n);
    if (layout.outer_stride == n_classes) return write_run(buffer, to, range.n * n_classes, streams);
    convert_runs(buffer, n_classes, to, layout.outer_stride, range.n, n_classes);
  } else if (n_inner <= kMaxShortRun) {
    for_short_blocks(range, [&](int64_t c, int64_t n, int64_t j, int64_t offset) __attribute__((always_inline)) {
      convert_runs(from + c * width + j, width, to + offset, stride, n, n_inner);
    });
  } else {
    range.for_runs([&](int64_t j, int64_t m, int64_t offset) __attribute__((always_inline)) {
      for (int64_t c = 0; c < n_classes; ++c) write_run(from + c * width + j, to + offset + c * stride, m, streams);
    });
  }
}

}  // namespace fastopt::cpu
