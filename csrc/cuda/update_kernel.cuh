// The one CUDA loop for all rules: a block of threads updates one chunk of one tensor.
#pragma once

#include "cuda/pack.h"
#include "cuda/update_arguments.cuh"

namespace fastopt::cuda {

template <class Rule, class P, class S, bool kScales>
struct Updater {
  using T = typename Rule::Real;
  static constexpr int kStates = Rule::kStates;
  // Of each array, in flight at a time: what registers hold.
  static constexpr int kElementsPerThread = sizeof(T) == 8 ? 4 : 8;
  static constexpr int64_t kElementsPerBlock = kUpdateThreads * kElementsPerThread;
  static_assert(kChunkUnit % kElementsPerBlock == 0, "whole chunks need no scalar loop");
  Rule rule;
  P* param;
  P* grad;
  S* state[kMaxStates];
  tail_t<Rule>* tail;  // or null
  T grad_scale;

  // Returns the parameter before it is rounded.
  __device__ __forceinline__ T update(P& stored_param, P& stored_grad, S* stored_states, int stride) const {
    T value = load(stored_param);
    T gradient = load(stored_grad);
    T states[kMaxStates] = {};
#pragma unroll
    for (int s = 0; s < kStates; ++s) states[s] = load(stored_states[s * stride]);
    if constexpr (kScales) {
      gradient /= grad_scale;
      store(stored_grad, gradient);
    }
    rule(value, gradient, states);
    store(stored_param, value);
#pragma unroll
    for (int s = 0; s < kStates; ++s) store(stored_states[s * stride], states[s]);
    return value;
  }

  __device__ __forceinline__ void update_tail(int64_t i, T updated) const {
    if constexpr (kHasTail<Rule>) {
      T last = load(tail[i]);
      rule.tail(updated, last);
      store(tail[i], last);
    }
  }

  // Adds the terms of an element before its update.
  __device__ __forceinline__ void add_terms(int64_t i, T* sums) const {
    if constexpr (kSumsOf<Rule> > 0) {
      T gradient = load(grad[i]), states[kMaxStates] = {}, terms[kMaxSums] = {};
      if constexpr (kScales) gradient /= grad_scale;
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[s] = load(state[s][i]);
      rule.terms(load(param[i]), gradient, states, terms);
#pragma unroll
      for (int k = 0; k < kSumsOf<Rule>; ++k) sums[k] += terms[k];
    }
  }

  __device__ __forceinline__ void one(int64_t i) const {
    S states[kMaxStates];
    P value = param[i], gradient = grad[i];
#pragma unroll
    for (int s = 0; s < kStates; ++s) states[s] = state[s][i];
    update_tail(i, update(value, gradient, states, 1));
    param[i] = value;
    if constexpr (kScales) grad[i] = gradient;
#pragma unroll
    for (int s = 0; s < kStates; ++s) state[s][i] = states[s];
  }

  // kElementsPerThread elements from `first` on: everything is loaded before anything is computed.
  __device__ __forceinline__ void several(int64_t first) const {
    constexpr int kSmallest = sizeof(P) < sizeof(S) ? sizeof(P) : sizeof(S);
    constexpr int kVector = kAccessBytes / kSmallest;
    constexpr int kRounds = kElementsPerThread / kVector;
    using ParamPack = Pack<P, kVector>;
    using StatePack = Pack<S, kVector>;
    ParamPack params[kRounds], grads[kRounds];
    StatePack states[kRounds][kStates > 0 ? kStates : 1];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = first + (r * kUpdateThreads + threadIdx.x) * kVector;
      params[r] = ParamPack::load_global(param + i);
      grads[r] = ParamPack::load_global(grad + i);
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[r][s] = StatePack::load_global(state[s] + i);
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = first + (r * kUpdateThreads + threadIdx.x) * kVector;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        update_tail(i + k, update(params[r].values[k], grads[r].values[k], &states[r][0].values[k], kVector));
      }
      params[r].store_global(param + i);
      if constexpr (kScales) grads[r].store_global(grad + i);
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[r][s].store_global(state[s] + i);
    }
  }

  __device__ __forceinline__ void range(int64_t begin, int64_t end, bool is_aligned) const {
    if (is_aligned) {
      for (; begin + kElementsPerBlock <= end; begin += kElementsPerBlock) several(begin);
    }
    for (int64_t i = begin + threadIdx.x; i < end; i += kUpdateThreads) one(i);
  }
};

// Calls f with the updater of an entry.
template <class Rule, class P, class S, int kCapacity, class F>
__device__ __forceinline__ void with_updater(const UpdateArguments<kCapacity>& arguments, const UpdateEntry& entry,
                                             const Rule& rule, F&& f) {
  const auto run = [&](auto scales) {
    using T = typename Rule::Real;
    Updater<Rule, P, S, decltype(scales)::value> updater{
        rule, static_cast<P*>(entry.param), static_cast<P*>(entry.grad), {}, nullptr, T(1)};
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      updater.state[s] = static_cast<S*>(entry.kept[s]);
      FASTOPT_ASSUME_GLOBAL(updater.state[s]);
    }
    if constexpr (kHasTail<Rule>) {
      updater.tail = static_cast<tail_t<Rule>*>(entry.kept[Rule::kStates + Rule::Scalars::kNumberCount]);
    }
    FASTOPT_ASSUME_GLOBAL(updater.param);
    FASTOPT_ASSUME_GLOBAL(updater.grad);
    if (arguments.grad_scale) updater.grad_scale = static_cast<T>(*arguments.grad_scale);
    f(updater);
  };
  if (arguments.grad_scale) {
    run(BoolConstant<true>{});
  } else {
    run(BoolConstant<false>{});
  }
}

// Before the update: the sums of each chunk.
template <class Rule, class P, class S, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads)
    sum_kernel(const __grid_constant__ UpdateArguments<kCapacity> arguments) {
  if (arguments.found_inf && *arguments.found_inf > 0) return;
  const UpdateEntry* entries = arguments.device_entries ? arguments.device_entries : arguments.entries;
  const Chunk chunk = chunk_of_block(arguments, entries);
  const Rule rule = rule_of<Rule>(arguments.rules[chunk.entry.rule], chunk.entry);
  typename Rule::Real sums[kMaxSums] = {};
  with_updater<Rule, P, S>(arguments, chunk.entry, rule, [&](const auto& updater) {
    for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kUpdateThreads) updater.add_terms(i, sums);
  });
#pragma unroll
  for (int k = 0; k < kSumsOf<Rule>; ++k) {
    const double sum = Group<true>::sum(static_cast<double>(sums[k]));
    if (threadIdx.x == 0) arguments.sums[static_cast<int64_t>(blockIdx.x) * kSumsOf<Rule> + k] = sum;
  }
}

template <class Rule, class P, class S, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, 2)
    update_kernel(const __grid_constant__ UpdateArguments<kCapacity> arguments) {
  if (arguments.found_inf && *arguments.found_inf > 0) return;
  const UpdateEntry* entries = arguments.device_entries ? arguments.device_entries : arguments.entries;
  if (static_cast<int>(blockIdx.x) < arguments.n_chunks) {
    const Chunk chunk = chunk_of_block(arguments, entries);
    Rule rule = rule_of<Rule>(arguments.rules[chunk.entry.rule], chunk.entry);
    if constexpr (kSumsOf<Rule> > 0) take_sums(rule, chunk.entry, arguments.sums, arguments.chunk);
    with_updater<Rule, P, S>(arguments, chunk.entry, rule, [&](const auto& updater) {
      updater.range(chunk.begin, chunk.end, chunk.entry.is_aligned);
    });
  }
  if (arguments.ticket) advance_scalars<Rule>(entries, arguments.n_entries, arguments.rules, arguments.ticket);
}

template <class Rule, class P, class S, int kCapacity>
int launch_update_kernel(const Update& update, cudaStream_t stream) {
  UpdateArguments<kCapacity> arguments;
  arguments.device_entries = update.is_on_device ? update.entries : nullptr;
  arguments.grad_scale = update.grad_scale;
  arguments.found_inf = update.found_inf;
  arguments.sums = update.sums;
  arguments.ticket = update.ticket;
  arguments.n_entries = update.n_entries;
  arguments.n_chunks = update.n_chunks;
  arguments.chunk = update.chunk;
  memcpy(arguments.rules, update.rules, update.n_rules * sizeof(PackedRule));
  if (!update.is_on_device) memcpy(arguments.entries, update.entries, update.n_entries * sizeof(UpdateEntry));
  if constexpr (kSumsOf<Rule> > 0) {
    if (update.n_chunks > 0) {
      FASTOPT_LAUNCH((sum_kernel<Rule, P, S, kCapacity>), update.n_chunks, kUpdateThreads, 0, stream, arguments);
    }
  }
  const int n_blocks = update.n_chunks > 0 ? update.n_chunks : 1;  // without elements the scalars still advance
  FASTOPT_LAUNCH((update_kernel<Rule, P, S, kCapacity>), n_blocks, kUpdateThreads, 0, stream, arguments);
  return cudaGetLastError();
}

template <class Rule, class P, class S>
int launch_rule(const Update& update, cudaStream_t stream) {
  if (update.is_on_device || update.n_entries <= kFewEntries) {
    return launch_update_kernel<Rule, P, S, kFewEntries>(update, stream);
  }
  return launch_update_kernel<Rule, P, S, kManyEntries>(update, stream);
}

// For parameters and gradients of type P and states of type S; each combination is compiled in a file of its own.
template <class P, class S>
int launch_update(const Update& update, cudaStream_t stream) {
  // With a capture, so that nvcc declares no conversion to a function pointer, of which it warns.
  static const auto table = table_of_rules<compute_t<P>>(
      [&]<class Rule>() -> int (*)(const Update&, cudaStream_t) { return launch_rule<Rule, P, S>; });
  const auto launch = update.rule >= 0 && update.rule < kRuleIds ? table[update.rule] : nullptr;
  return launch ? launch(update, stream) : cudaErrorInvalidValue;
}

extern template int launch_update<double, double>(const Update&, cudaStream_t);
extern template int launch_update<float, float>(const Update&, cudaStream_t);
extern template int launch_update<float, BFloat16>(const Update&, cudaStream_t);
extern template int launch_update<BFloat16, BFloat16>(const Update&, cudaStream_t);
extern template int launch_update<BFloat16, float>(const Update&, cudaStream_t);
extern template int launch_update<Half, Half>(const Update&, cudaStream_t);
extern template int launch_update<Half, float>(const Update&, cudaStream_t);

}  // namespace fastopt::cuda
