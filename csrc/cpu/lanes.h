// Reductions by lane: several vectors of any instruction set side by side, so that no term waits for the one before.
#pragma once

#include <limits>  // numeric_limits

#include "common.h"

namespace fastopt::cpu {

constexpr int64_t kLanes = 64;
// Terms of one lane summed in the compute type before the sum moves to double.
constexpr int64_t kSumTerms = 16;

// Folds the upper half of the lanes onto the lower one, until one is left.
template <int64_t kWidth = kLanes / 2, class T, class F>
FASTOPT_HD T fold_lanes(T* lanes, F f) {
#pragma omp simd
  for (int64_t l = 0; l < kWidth; ++l) lanes[l] = f(lanes[l], lanes[l + kWidth]);
  if constexpr (kWidth > 1) return fold_lanes<kWidth / 2>(lanes, f);
  return lanes[0];
}

// Sums of terms, by lane: of a few in the compute type, of all in double.
template <class T>
struct LaneSums {
  alignas(64) T few[kLanes] = {};
  alignas(64) double all[kLanes] = {};

  FASTOPT_HD void flush() {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      all[l] += few[l];
      few[l] = 0;
    }
  }
  FASTOPT_HD double total() const {
    alignas(64) double lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = all[l];
    return fold_lanes(lanes, [](double a, double b) { return a + b; });
  }
};

// The lowest finite number if there is no larger one: -inf - -inf would not be a number.
template <class T>
FASTOPT_HD T max_of(const T* x, int64_t n) {
  alignas(64) T running[kLanes];  // which stays in registers
  for (int64_t l = 0; l < kLanes; ++l) running[l] = std::numeric_limits<T>::lowest();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) running[l] = x[i + l] > running[l] ? x[i + l] : running[l];
  }
  alignas(64) T lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = running[l];
#pragma omp simd
  for (int64_t l = 0; l < n - i; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  return fold_lanes(lanes, [](T a, T b) { return b > a ? b : a; });
}

}  // namespace fastopt::cpu
