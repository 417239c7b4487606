// The one CPU loop for all rules and stored types; for 16-bit types also by blocks that are converted together.
#pragma once

#include <type_traits>  // is_same_v

#include "cpu/isa.h"
#include "cpu/sixteen_bits.h"
#include "update/tensor_update.h"

namespace fastopt::cpu {

// Parameters and gradients of type P, states of type S.
template <class P, class S = P>
struct Arrays {
  P* param;
  const P* grad;
  S* state[kMaxStates];
  void* tail;  // of the rule's Tail, or unused
};

template <class P, class S = P>
using Update = void (*)(const Arrays<P, S>&, const void* rule, int64_t n);

template <class Rule, class P, class S>
FASTOPT_HD void update_elements(const Arrays<P, S>& arrays, const Rule& rule, int64_t n) {
  using T = typename Rule::Real;
  constexpr int kStates = Rule::kStates;
  P* __restrict param = arrays.param;
  const P* __restrict grad = arrays.grad;
  S* __restrict state0 = arrays.state[0];
  S* __restrict state1 = arrays.state[1];
  S* __restrict state2 = arrays.state[2];
  auto* __restrict tail = static_cast<tail_t<Rule>*>(arrays.tail);
  for (int64_t i = 0; i < n; ++i) {
    T value = load(param[i]);
    T state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = load(state0[i]);
    if constexpr (kStates > 1) state[1] = load(state1[i]);
    if constexpr (kStates > 2) state[2] = load(state2[i]);
    rule(value, load(grad[i]), state);
    store(param[i], value);
    if constexpr (kStates > 0) store(state0[i], state[0]);
    if constexpr (kStates > 1) store(state1[i], state[1]);
    if constexpr (kStates > 2) store(state2[i], state[2]);
    if constexpr (kHasTail<Rule>) {
      T last = load(tail[i]);
      rule.tail(value, last);
      store(tail[i], last);
    }
  }
}

// Makes the arrays begin n elements later.
template <class Rule, class P, class S>
FASTOPT_HD void advance(Arrays<P, S>& arrays, int64_t n) {
  arrays.param += n;
  arrays.grad += n;
  for (int s = 0; s < Rule::kStates; ++s) arrays.state[s] += n;
  if constexpr (kHasTail<Rule>) arrays.tail = static_cast<tail_t<Rule>*>(arrays.tail) + n;
}

// Bytes of each array that lie between what is updated and what is fetched: a page, for many a processor by itself
// fetches ahead within a page only.
constexpr int64_t kBytesAhead = 4096;

// True if a step prefetches. Conversions of 16 bits, roots and quotients hold up memory on Intel's processors; AMD's
// run ahead of them by themselves, and there each line that is asked for costs time.
template <class Rule, class P>
FASTOPT_HD bool is_fetched() {
  return FASTOPT_CPU_IS_INTEL && (sizeof(P) < sizeof(float) || Rule::kDivides);
}

template <int64_t kBlock, class S>
FASTOPT_HD void fetch_block(const S* block) {
  for (int64_t i = 0; i < kBlock; i += kLineBytes / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(block + i);
}

// Calls f for each block of the arrays, which then begin with the n < kBlock elements that are left, and fetches if
// it helps.
template <class Rule, int64_t kBlock, class P, class S, class F>
FASTOPT_HD void for_blocks(Arrays<P, S>& arrays, int64_t& n, F&& f) {
  constexpr int64_t kAhead = kBytesAhead / sizeof(P);
  const bool fetches = is_fetched<Rule, P>();
  for (; n >= kBlock; n -= kBlock) {
    if (fetches && n >= kAhead + kBlock) {
      fetch_block<kBlock>(arrays.param + kAhead);
      fetch_block<kBlock>(arrays.grad + kAhead);
      for (int s = 0; s < Rule::kStates; ++s) fetch_block<kBlock>(arrays.state[s] + kAhead);
    }
    f();
    advance<Rule>(arrays, kBlock);
  }
}

// Elements between which memory is fetched: more, and their loop would wait for it; fewer, and there would be none.
constexpr int64_t kFetchedTogether = 128;

template <class Rule, class P, class S>
FASTOPT_HD void update_all(Arrays<P, S> arrays, const void* rule_bytes, int64_t n) {
  const Rule rule = *static_cast<const Rule*>(rule_bytes);
  if (is_fetched<Rule, P>()) {
    for_blocks<Rule, kFetchedTogether>(
        arrays, n, [&]() __attribute__((always_inline)) { update_elements(arrays, rule, kFetchedTogether); });
  }
  update_elements(arrays, rule, n);
}

template <class Rule, class P, class S>
FASTOPT_CLONES void update_arrays(const Arrays<P, S>& arrays, const void* rule, int64_t n) {
  update_all<Rule>(arrays, rule, n);
}

#if defined(FASTOPT_TARGET_V3)
// Vectors of 256 bits for a processor that has 512 too.
template <class Rule, class P, class S>
FASTOPT_TARGET_V3 __attribute__((flatten)) void update_narrow(const Arrays<P, S>& arrays, const void* rule, int64_t n) {
  update_all<Rule>(arrays, rule, n);
}

// Where a processor has no instructions for a 16-bit type; one that has them gets the loops below.
template <class Rule, class P, class S>
void update_baseline(const Arrays<P, S>& arrays, const void* rule, int64_t n) {
  update_all<Rule>(arrays, rule, n);
}

// Elements of 16 bits that are widened together, perhaps in another order, so not for a rule with a tail. So few that
// vectors of 512 bits stay in registers: through memory, a step of Adam takes 1.5 times as long on a Zen 4 whose core
// another tenant uses too, and no less on one alone.
constexpr int64_t kBlock = 32;

template <class Rule, class Conversion, class S>
FASTOPT_HD void update_block(const Arrays<S>& arrays, const Rule& rule) {
  alignas(64) float param[kBlock], grad[kBlock], states[kMaxStates][kBlock];
  for (int64_t i = 0; i < kBlock; i += Conversion::kWidth) {
    Conversion::widen(arrays.param + i, param + i);
    Conversion::widen(arrays.grad + i, grad + i);
    for (int s = 0; s < Rule::kStates; ++s) Conversion::widen(arrays.state[s] + i, states[s] + i);
  }
  update_elements(Arrays<float>{param, grad, {states[0], states[1], states[2]}, nullptr}, rule, kBlock);
  for (int64_t i = 0; i < kBlock; i += Conversion::kWidth) {
    Conversion::narrow(param + i, arrays.param + i);
    for (int s = 0; s < Rule::kStates; ++s) Conversion::narrow(states[s] + i, arrays.state[s] + i);
  }
}

template <class Rule, class Conversion, class S>
FASTOPT_HD void update_by_blocks(Arrays<S> arrays, const void* rule_bytes, int64_t n) {
  const Rule rule = *static_cast<const Rule*>(rule_bytes);
  for_blocks<Rule, kBlock>(arrays, n,
                           [&]() __attribute__((always_inline)) { update_block<Rule, Conversion>(arrays, rule); });
  if (n == 0) return;
  // A block that begins with what is left.
  S param[kBlock] = {}, grad[kBlock] = {}, states[kMaxStates][kBlock] = {};
  const size_t n_bytes = n * sizeof(S);
  memcpy(param, arrays.param, n_bytes);
  memcpy(grad, arrays.grad, n_bytes);
  for (int s = 0; s < Rule::kStates; ++s) memcpy(states[s], arrays.state[s], n_bytes);
  update_block<Rule, Conversion>(Arrays<S>{param, grad, {states[0], states[1], states[2]}, nullptr}, rule);
  memcpy(arrays.param, param, n_bytes);
  for (int s = 0; s < Rule::kStates; ++s) memcpy(arrays.state[s], states[s], n_bytes);
}

// Flattened: what is called is inlined where it may use the level's instructions.
template <class Rule, class Conversion, class S = typename Conversion::Stored>
FASTOPT_TARGET_V3 __attribute__((flatten)) void update_v3(const Arrays<S>& arrays, const void* rule, int64_t n) {
  update_by_blocks<Rule, Conversion>(arrays, rule, n);
}
#endif

#if defined(FASTOPT_TARGET_V4)
template <class Rule, class Conversion, class S = typename Conversion::Stored>
FASTOPT_TARGET_V4 __attribute__((flatten)) void update_v4(const Arrays<S>& arrays, const void* rule, int64_t n) {
  update_by_blocks<Rule, Conversion>(arrays, rule, n);
}
#endif

// The loop that this processor runs fastest. 16-bit types that parameters and states share have vector conversions.
template <class Rule, class P, class S>
Update<P, S> update_function() {
  if constexpr (kHasTail<Rule>) return update_arrays<Rule, P, S>;
#if defined(FASTOPT_TARGET_V4)
  if constexpr (std::is_same_v<P, Half> && std::is_same_v<S, Half>) {
    if (FASTOPT_CPU_HAS_V4) return update_v4<Rule, HalfV4>;
  }
  if constexpr (std::is_same_v<P, BFloat16> && std::is_same_v<S, BFloat16>) {
    if (FASTOPT_CPU_HAS_V4) return update_v4<Rule, BFloat16V4>;
  }
#endif
#if defined(FASTOPT_TARGET_V3)
  if constexpr (std::is_same_v<P, Half> && std::is_same_v<S, Half>) {
    return FASTOPT_CPU_HAS_V3 ? update_v3<Rule, HalfV3> : update_baseline<Rule, P, S>;
  }
#endif
#if defined(FASTOPT_TARGET_V4)
  // A loop that only waits for memory: on AMD's Zen 4 vectors of 512 bits make it 3 to 15 % slower.
  if constexpr (!Rule::kDivides && sizeof(P) >= sizeof(float)) {
    if (FASTOPT_CPU_HAS_V4 && !FASTOPT_CPU_IS_INTEL) return update_narrow<Rule, P, S>;
  }
#endif
  return update_arrays<Rule, P, S>;
}

// --- Before the update -----------------------------------------------------------------------------------------------

template <class P, class S = P>
using AddTerms = void (*)(const Arrays<P, S>&, const void* rule, int64_t n, double* sums);

// Elements whose terms are added in the type that the rule computes in, in lanes that are a vector; then in double.
constexpr int64_t kSumLanes = 16, kSummedTogether = 64 * kSumLanes;

// Adds the terms of all elements to the rule's sums.
template <class Rule, class P, class S>
FASTOPT_CLONES void add_terms(const Arrays<P, S>& arrays, const void* rule_bytes, int64_t n, double* sums) {
  using T = typename Rule::Real;
  const Rule rule = *static_cast<const Rule*>(rule_bytes);
  for (int64_t begin = 0; begin < n; begin += kSummedTogether) {
    T lanes[Rule::kSums][kSumLanes] = {};
    const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
      T state[kMaxStates] = {}, terms[Rule::kSums] = {};
      for (int s = 0; s < Rule::kStates; ++s) state[s] = load(arrays.state[s][i]);
      rule.terms(load(arrays.param[i]), load(arrays.grad[i]), state, terms);
      for (int k = 0; k < Rule::kSums; ++k) lanes[k][lane] += terms[k];
    };
    const int64_t end = begin + kSummedTogether < n ? begin + kSummedTogether : n;
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) add(i + lane, lane);
    }
    for (int64_t lane = 0; i < end; ++i, ++lane) add(i, lane);
    for (int k = 0; k < Rule::kSums; ++k) {
      for (const T lane : lanes[k]) sums[k] += lane;
    }
  }
}

}  // namespace fastopt::cpu
