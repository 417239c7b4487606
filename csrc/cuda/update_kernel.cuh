// The one CUDA loop for all rules: a block of threads updates one chunk of one tensor.
#pragma once

#include <cstddef>  // size_t

#include "cuda/library.h"
#include "cuda/pack.h"
#include "rules/rules.h"

namespace fastopt::cuda {

constexpr int kUpdateThreads = 256;
// With nvcc and driver of CUDA 12.1 or later, as _build_cuda.py and library.cu check; every architecture since Volta.
constexpr size_t kMaxArgumentBytes = 32764;

template <int kCapacity>
struct UpdateArguments {
  const UpdateEntry* device_entries;  // or null: those below
  const float* grad_scale;
  const float* found_inf;
  uint32_t* ticket;
  int32_t n_entries, n_chunks, chunk;
  PackedRule rules[kMaxRules];
  UpdateEntry entries[kCapacity];
};
static_assert(sizeof(UpdateArguments<kManyEntries>) <= kMaxArgumentBytes, "the arguments of a kernel must fit");

// The options of a rule that the host could not finish, with lr from the device if it is there.
template <class Rule>
__device__ __forceinline__ typename Rule::Options options_of(const PackedRule& source) {
  typename Rule::Options options;
  memcpy(&options, source.bytes, sizeof(options));
  if (source.lr) {
    options.lr = source.lr_dtype == DType::kFloat64 ? *static_cast<const double*>(source.lr)
                                                    : static_cast<double>(*static_cast<const float*>(source.lr));
  }
  return options;
}

// An entry's scalars before the step: its own on the device, or those that the host has read.
template <class Rule>
__device__ __forceinline__ typename Rule::Scalars scalars_of(const PackedRule& source, const UpdateEntry& entry) {
  constexpr int kScalars = Rule::Scalars::kNumberCount;
  typename Rule::Scalars scalars{};
  if constexpr (kScalars > 0) {
    double numbers[kScalars];
#pragma unroll
    for (int i = 0; i < kScalars; ++i) {
      numbers[i] = entry.has_scalars_on_device
                       ? read_scalar(entry.kept[Rule::kStates + i], entry.double_scalars >> i & 1)
                       : source.scalars_before[i];
    }
    memcpy(&scalars, numbers, sizeof(numbers));
    scalars.are_float = entry.double_scalars == 0;
  }
  return scalars;
}

// The rule of an entry: finished by the host, or finished here from the numbers on the device, by one thread.
template <class Rule>
__device__ __forceinline__ Rule rule_of(const PackedRule& source, const UpdateEntry& entry) {
  if (source.is_finished) {
    Rule rule;
    memcpy(&rule, source.bytes, sizeof(Rule));
    return rule;
  }
  __shared__ __align__(16) char finished[kMaxRuleBytes];
  if (threadIdx.x == 0) {
    auto scalars = scalars_of<Rule>(source, entry);
    const Rule rule = Rule::at_step(options_of<Rule>(source), scalars);
    memcpy(finished, &rule, sizeof(Rule));
  }
  __syncthreads();
  Rule rule;
  memcpy(&rule, finished, sizeof(Rule));
  return rule;
}

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
  T grad_scale;

  __device__ __forceinline__ void update(P& stored_param, P& stored_grad, S* stored_states, int stride) const {
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
  }

  __device__ __forceinline__ void one(int64_t i) const {
    S states[kMaxStates];
    P value = param[i], gradient = grad[i];
#pragma unroll
    for (int s = 0; s < kStates; ++s) states[s] = state[s][i];
    update(value, gradient, states, 1);
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
        update(params[r].values[k], grads[r].values[k], &states[r][0].values[k], kVector);
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

// The entry whose chunks include `chunk`: the last that begins at or before it.
__device__ __forceinline__ int find_entry(const UpdateEntry* entries, int n_entries, int chunk) {
  int low = 0, high = n_entries;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The last block to come here advances the scalars on the device: by then every block has read them.
template <class Rule>
__device__ __forceinline__ void advance_scalars(const UpdateEntry* entries, int n_entries, const PackedRule* rules,
                                                uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // back to 0 for the next launch
  }
  __syncthreads();
  if (!is_last) return;
  constexpr int kScalars = Rule::Scalars::kNumberCount;
  if constexpr (kScalars > 0) {
    for (int i = threadIdx.x; i < n_entries; i += kUpdateThreads) {
      const UpdateEntry& entry = entries[i];
      if (!entry.has_scalars_on_device) continue;
      // Of the rule itself nothing is used here, and the compiler leaves it out.
      auto scalars = scalars_of<Rule>(rules[entry.rule], entry);
      Rule::at_step(options_of<Rule>(rules[entry.rule]), scalars);
      double numbers[kScalars];
      memcpy(numbers, &scalars, sizeof(numbers));
#pragma unroll
      for (int s = 0; s < kScalars; ++s) {
        write_scalar(entry.kept[Rule::kStates + s], entry.double_scalars >> s & 1, numbers[s]);
      }
    }
  }
}

template <class Rule, class P, class S, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, 2)
    update_kernel(const __grid_constant__ UpdateArguments<kCapacity> arguments) {
  if (arguments.found_inf && *arguments.found_inf > 0) return;
  const UpdateEntry* entries = arguments.device_entries ? arguments.device_entries : arguments.entries;
  const int chunk = static_cast<int>(blockIdx.x);
  if (chunk < arguments.n_chunks) {
    const UpdateEntry& entry = entries[find_entry(entries, arguments.n_entries, chunk)];
    const Rule rule = rule_of<Rule>(arguments.rules[entry.rule], entry);
    const int64_t begin = static_cast<int64_t>(chunk - entry.first_chunk) * arguments.chunk;
    const int64_t end = begin + arguments.chunk < entry.numel ? begin + arguments.chunk : entry.numel;
    const auto run = [&](auto scales) {
      using T = typename Rule::Real;
      Updater<Rule, P, S, decltype(scales)::value> updater{
          rule, static_cast<P*>(entry.param), static_cast<P*>(entry.grad), {}, T(1)};
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) {
        updater.state[s] = static_cast<S*>(entry.kept[s]);
        FASTOPT_ASSUME_GLOBAL(updater.state[s]);
      }
      FASTOPT_ASSUME_GLOBAL(updater.param);
      FASTOPT_ASSUME_GLOBAL(updater.grad);
      if (arguments.grad_scale) updater.grad_scale = static_cast<T>(*arguments.grad_scale);
      updater.range(begin, end, entry.is_aligned);
    };
    if (arguments.grad_scale) {
      run(BoolConstant<true>{});
    } else {
      run(BoolConstant<false>{});
    }
  }
  if (arguments.ticket) advance_scalars<Rule>(entries, arguments.n_entries, arguments.rules, arguments.ticket);
}

template <class Rule, class P, class S, int kCapacity>
int launch_update_kernel(const Update& update, cudaStream_t stream) {
  UpdateArguments<kCapacity> arguments;
  arguments.device_entries = update.is_on_device ? update.entries : nullptr;
  arguments.grad_scale = update.grad_scale;
  arguments.found_inf = update.found_inf;
  arguments.ticket = update.ticket;
  arguments.n_entries = update.n_entries;
  arguments.n_chunks = update.n_chunks;
  arguments.chunk = update.chunk;
  memcpy(arguments.rules, update.rules, update.n_rules * sizeof(PackedRule));
  if (!update.is_on_device) memcpy(arguments.entries, update.entries, update.n_entries * sizeof(UpdateEntry));
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
