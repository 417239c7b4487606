// The blocks of a wide row: their sizes, conversion to the compute type, maximum, and groups of lanes.
#pragma once

#include <limits>       // numeric_limits
#include <type_traits>  // is_same_v

#include "cpu/lanes.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// A row has at least kLanes classes. Logits of a block and their exponentials stay in the first-level cache. The last
// block has up to kLanes more, so that none has fewer than kLanes.
constexpr int64_t kRowBlock = 2048, kMaxRowBlock = kRowBlock + kLanes;
// Prefetch distance, in logits: the block after next.
constexpr int64_t kPrefetchDistance = 2 * kRowBlock;

// Classes of the block that starts at `first`.
FASTOPT_HD int64_t block_size(int64_t first, int64_t n_classes) {
  const int64_t n = n_classes - first;
  return n <= kMaxRowBlock ? n : kRowBlock;
}

// Calls f(i) for groups of kLanes classes from i on; the last group overlaps the one before it if n is no multiple.
template <class F>
FASTOPT_HD void for_whole_groups(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(n - kLanes);
}

// A block in the compute type: the block itself, or its copy converted into the buffer.
template <class S>
FASTOPT_HD const compute_t<S>* widened(const S* from, int64_t n, compute_t<S>* buffer) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return from;
  } else {
    for_whole_groups(n, [&](int64_t i) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) buffer[i + l] = load(from[i + l]);
    });
    return buffer;
  }
}

// The same, and the block's maximum: at least the lowest finite number, for -inf - -inf is not a number.
template <class S>
FASTOPT_HD compute_t<S> widen_and_find_max(const S* from, int64_t n, compute_t<S>* buffer, const compute_t<S>*& x) {
  using T = compute_t<S>;
  alignas(64) T running[kLanes];  // which stays in registers
  for (int64_t l = 0; l < kLanes; ++l) running[l] = std::numeric_limits<T>::lowest();
  for_whole_groups(n, [&](int64_t i) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const T value = load(from[i + l]);
      if constexpr (!std::is_same_v<S, T>) buffer[i + l] = value;
      running[l] = value > running[l] ? value : running[l];
    }
  });
  if constexpr (std::is_same_v<S, T>) {
    x = from;
  } else {
    x = buffer;
  }
  return fold_lanes(running, [](T a, T b) { return b > a ? b : a; });
}

// Calls f(i, m) for each group of m <= kLanes classes in [begin, end) of a block, and prefetches logits that will be
// read later.
template <class S, class F>
FASTOPT_HD void for_groups(const S* logits, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t kLineElements = kLineBytes / sizeof(S);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int64_t l = 0; l < kLanes; l += kLineElements) __builtin_prefetch(logits + kPrefetchDistance + i + l);
    f(i, kLanes);
  }
  if (i < end) f(i, end - i);
}

}  // namespace fastopt::cpu
