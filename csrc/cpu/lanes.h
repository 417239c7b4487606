// Vectors of 64 bytes as plain arithmetic: the compiler makes of them what each instruction set has, one register of
// AVX-512, two of AVX2 or four of SSE2 and NEON.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // how such vectors are passed: they never are, everything is inlined
#endif

#include <cstring>  // memcpy

#include "common.h"
#include "math/exp.h"

namespace fastopt::cpu {

using fastopt::exp_nonpositive;

template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(64)));
  typedef double wide __attribute__((vector_size(64 / sizeof(T) * sizeof(double))));
};
template <class T>
using Lanes = typename LanesOf<T>::type;
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <class T>
FASTOPT_HD Lanes<T> load_lanes(const T* from) {
  Lanes<T> lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// The first n lanes from memory, the others `rest`.
template <class T>
FASTOPT_HD Lanes<T> load_lanes(const T* from, int64_t n, T rest) {
  Lanes<T> lanes = Lanes<T>{} + rest;
  memcpy(&lanes, from, n * sizeof(T));
  return lanes;
}

template <class T>
FASTOPT_HD void store_lanes(T* to, const Lanes<T>& lanes, int64_t n = kLanes<T>) {
  memcpy(to, &lanes, n * sizeof(T));
}

// 0 in all but the first n lanes.
template <class T>
FASTOPT_HD Lanes<T> keep_first(Lanes<T> lanes, int64_t n) {
  for (int64_t i = n; i < kLanes<T>; ++i) lanes[i] = 0;
  return lanes;
}

FASTOPT_HD Lanes<float> exp_nonpositive(const Lanes<float>& x) {
  return exp_of_floats<Lanes<float>, Lanes<uint32_t>>(x);
}
FASTOPT_HD Lanes<double> exp_nonpositive(const Lanes<double>& x) {
  return exp_of_doubles<Lanes<double>, Lanes<uint64_t>>(x);
}

// A sum of each lane, in double.
template <class T>
struct LaneSums {
  typename LanesOf<T>::wide sums = {};

  FASTOPT_HD void add(const Lanes<T>& terms) { sums += __builtin_convertvector(terms, typename LanesOf<T>::wide); }
  FASTOPT_HD double total() const {
    double total = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) total += sums[i];
    return total;
  }
};

}  // namespace fastopt::cpu
