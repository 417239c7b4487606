// The one CPU loop for all pointwise losses and stored types.
#pragma once

#include <algorithm>    // min
#include <type_traits>  // is_same_v
#include <utility>      // index_sequence

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/line_writer.h"
#include "cpu/sixteen_bits.h"
#include "losses/pointwise.h"

namespace fastopt::cpu {

// A range of a problem's elements. Gradients go past the caches if `streams`.
struct PointwiseRange {
  const PointwiseProblem& problem;
  int64_t begin, n;
  bool streams;
};

// What a problem wants: losses or their sum, gradients, or both.
enum class PointwiseWork : int8_t { kValues, kGradients, kBoth };

using PointwiseFunction = double (*)(const PointwiseRange&);

// Conversion of a block, as those in sixteen_bits.h, by the arithmetic of common.h.
template <class S>
struct PlainConversion {
  using Stored = S;
  static constexpr int64_t kWidth = kLanes;
  FASTOPT_HD static void widen(const S* from, compute_t<S>* to) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) to[l] = load(from[l]);
  }
  FASTOPT_HD static void narrow(const compute_t<S>* from, S* to) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) store(to[l], from[l]);
  }
};

// kLanes elements at once, of which the last block may hold fewer: there, the rest repeats the first element, so that
// it is in the loss's domain.
template <class Conversion>
struct PointwiseBlocks {
  using S = typename Conversion::Stored;
  using T = compute_t<S>;

  // The m numbers from `from` on in the compute type: themselves, or converted into `buffer`.
  FASTOPT_HD static const T* widened(const S* from, int64_t m, T* buffer) {
    if (m == kLanes) {
      if constexpr (std::is_same_v<S, T>) return from;
      for (int64_t i = 0; i < kLanes; i += Conversion::kWidth) Conversion::widen(from + i, buffer + i);
    } else {
      for (int64_t l = 0; l < kLanes; ++l) buffer[l] = load(from[l < m ? l : 0]);
    }
    return buffer;
  }
  FASTOPT_HD static void narrow(const T* from, int64_t m, S* to) {
    if (m == kLanes) {
      for (int64_t i = 0; i < kLanes; i += Conversion::kWidth) Conversion::narrow(from + i, to + i);
    } else {
      for (int64_t l = 0; l < m; ++l) store(to[l], from[l]);
    }
  }
};

template <class Loss, class T, size_t... kInputs>
FASTOPT_HD auto element_loss(const Loss& loss, const T* const (&inputs)[sizeof...(kInputs)], int64_t l,
                             std::index_sequence<kInputs...>) {
  return loss(inputs[kInputs][l]...);
}

template <class Loss, class Conversion, PointwiseWork kWork>
FASTOPT_HD double pointwise_range(const PointwiseRange& range) {
  constexpr bool kHasValues = kWork != PointwiseWork::kGradients, kHasGradients = kWork != PointwiseWork::kValues;
  using Blocks = PointwiseBlocks<Conversion>;
  using S = typename Blocks::S;
  using T = typename Blocks::T;
  constexpr int kDerivatives = Loss::kDerivatives;
  const PointwiseProblem& p = range.problem;
  Loss loss;
  if constexpr (Loss::kNumberCount > 0) memcpy(&loss, p.numbers, sizeof(loss));
  const T scale = static_cast<T>(p.grad_scale);

  const S* inputs[Loss::kInputs];
  for (int k = 0; k < Loss::kInputs; ++k) inputs[k] = static_cast<const S*>(p.inputs[k]) + range.begin;
  const S* const grad_outputs = p.grad_outputs ? static_cast<const S*>(p.grad_outputs) + range.begin : nullptr;
  S* const losses = p.losses ? static_cast<S*>(p.losses) + range.begin : nullptr;
  LineWriter<S, kLanes> gradients[kDerivatives];
  for (int k = 0; k < kDerivatives; ++k) {
    if (p.gradients[k]) gradients[k].begin(static_cast<S*>(p.gradients[k]) + range.begin, range.streams);
  }

  LaneSumsIf<kHasValues, T> sums;
  alignas(64) T buffers[Loss::kInputs + 1][kLanes], values[kLanes], derivatives[kDerivatives][kLanes], scales[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) scales[l] = scale;
  int64_t n_terms = 0;  // of each lane's partial sum
  for (int64_t i = 0; i < range.n; i += kLanes) {
    const int64_t m = std::min(kLanes, range.n - i);
    const T* wide[Loss::kInputs];
    for (int k = 0; k < Loss::kInputs; ++k) wide[k] = Blocks::widened(inputs[k] + i, m, buffers[k]);
    if (kHasGradients && grad_outputs) {
      const T* const factors = Blocks::widened(grad_outputs + i, m, buffers[Loss::kInputs]);
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) scales[l] = factors[l] * scale;
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const auto element = element_loss(loss, wide, l, std::make_index_sequence<Loss::kInputs>{});
      if constexpr (kHasValues) values[l] = element.value;
      if constexpr (kHasGradients) {
        for (int k = 0; k < kDerivatives; ++k) derivatives[k][l] = element.derivatives[k] * scales[l];
      }
    }
    if constexpr (kHasValues) {
      if (losses) Blocks::narrow(values, m, losses + i);
      if (p.wants_sum) {
        for (int64_t l = m; l < kLanes; ++l) values[l] = 0;
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) sums.partial[l] += values[l];
        if (++n_terms == kSumTerms) {
          sums.flush();
          n_terms = 0;
        }
      }
    }
    for (int k = 0; kHasGradients && k < kDerivatives; ++k) {
      if (!p.gradients[k]) continue;
      Blocks::narrow(derivatives[k], m, gradients[k].space(i));
      gradients[k].write(i, m);
    }
  }
  for (int k = 0; k < kDerivatives; ++k) {
    if (p.gradients[k]) gradients[k].end(range.n);
  }
  if (range.streams) end_streaming();
  sums.flush();
  return sums.total();
}

template <class Loss, class S, PointwiseWork kWork>
FASTOPT_CLONES double pointwise_clones(const PointwiseRange& range) {
  return pointwise_range<Loss, PlainConversion<S>, kWork>(range);
}

// Flattened: what is called is inlined where it may use the level's instructions.
#if defined(FASTOPT_TARGET_V3)
template <class Loss, class Conversion, PointwiseWork kWork>
FASTOPT_TARGET_V3 __attribute__((flatten)) double pointwise_v3(const PointwiseRange& range) {
  return pointwise_range<Loss, Conversion, kWork>(range);
}
#endif
#if defined(FASTOPT_TARGET_V4)
template <class Loss, class Conversion, PointwiseWork kWork>
FASTOPT_TARGET_V4 __attribute__((flatten)) double pointwise_v4(const PointwiseRange& range) {
  return pointwise_range<Loss, Conversion, kWork>(range);
}
#endif

// The loop that this processor runs fastest.
template <class Loss, class S, PointwiseWork kWork>
PointwiseFunction pointwise_function() {
#if defined(FASTOPT_TARGET_V4)
  if constexpr (std::is_same_v<S, Half>) {
    if (FASTOPT_CPU_HAS_V4) return pointwise_v4<Loss, HalfV4, kWork>;
  }
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (FASTOPT_CPU_HAS_V4) return pointwise_v4<Loss, BFloat16V4, kWork>;
  }
#endif
#if defined(FASTOPT_TARGET_V3)
  if constexpr (std::is_same_v<S, Half>) {
    if (FASTOPT_CPU_HAS_V3) return pointwise_v3<Loss, HalfV3, kWork>;
  }
#endif
  return pointwise_clones<Loss, S, kWork>;
}

}  // namespace fastopt::cpu
