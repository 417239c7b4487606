// Reductions by lane: several independent vectors of any instruction set, so that no addition waits for the last.
#pragma once

#include <algorithm>    // min
#include <cmath>        // fabs
#include <type_traits>  // conditional_t

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

// Sums of terms, by lane: partial sums of up to kSumTerms terms in the compute type, full sums in double.
template <class T, int64_t kN = kLanes>
struct LaneSums {
  alignas(64) T partial[kN];
  alignas(64) double full[kN];

  FASTOPT_HD LaneSums() {
#pragma omp simd
    for (int64_t l = 0; l < kN; ++l) partial[l] = 0;
#pragma omp simd
    for (int64_t l = 0; l < kN; ++l) full[l] = 0;
  }
  FASTOPT_HD void flush() {
#pragma omp simd
    for (int64_t l = 0; l < kN; ++l) {
      full[l] += partial[l];
      partial[l] = 0;
    }
  }
  FASTOPT_HD double of_lane(int64_t l) const { return full[l]; }
  FASTOPT_HD double total() const {
    alignas(64) double lanes[kN];
    for (int64_t l = 0; l < kN; ++l) lanes[l] = full[l];
    return fold_lanes<kN / 2>(lanes, [](double a, double b) { return a + b; });
  }
};

// Takes the place of LaneSums where nothing is summed.
struct NoLaneSums {
  FASTOPT_HD void flush() {}
  FASTOPT_HD double of_lane(int64_t) const { return 0; }
  FASTOPT_HD double total() const { return 0; }
};

template <bool kIsUsed, class T, int64_t kN = kLanes>
using LaneSumsIf = std::conditional_t<kIsUsed, LaneSums<T, kN>, NoLaneSums>;

// A sum of many terms in double that is as exact as if it were rounded once (Neumaier, 1974).
class CompensatedSum {
 public:
  void add(double term) {
    const double next = sum_ + term;
    lost_ += std::fabs(sum_) >= std::fabs(term) ? (sum_ - next) + term : (term - next) + sum_;
    sum_ = next;
  }
  double total() const {
    const double total = sum_ + lost_;
    return total == total ? total : sum_;  // of an infinite sum the lost part is NaN
  }

 private:
  double sum_ = 0, lost_ = 0;
};

// The sum of f(i) for i in [0, n), by lane and then pairwise.
template <class F>
FASTOPT_HD double sum_of(int64_t n, F&& f) {
  constexpr int64_t kTerms = 16 * kLanes;  // more are added in double with compensation
  CompensatedSum sum;
  for (int64_t begin = 0; begin < n; begin += kTerms) {
    alignas(64) double lanes[kLanes] = {};
    const int64_t end = std::min(begin + kTerms, n);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
    }
    for (int64_t l = 0; i < end; ++i, ++l) lanes[l] += f(i);
    sum.add(fold_lanes(lanes, [](double a, double b) { return a + b; }));
  }
  return sum.total();
}

}  // namespace fastopt::cpu
