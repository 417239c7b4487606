// What an update kernel is given, and what it finds there: its chunk, its rule.
#pragma once

#include <cstddef>  // size_t

#include "cuda/library.h"
#include "cuda/reduce.cuh"
#include "rules/rules.h"

namespace fastopt::cuda {

constexpr int kUpdateThreads = 256;
// With nvcc and driver of CUDA 12.1 or later, as fastopt/_build/cuda.py and library.cu check; every architecture since
// Volta.
constexpr size_t kMaxArgumentBytes = 32764;

template <int kCapacity>
struct UpdateArguments {
  const UpdateEntry* device_entries;  // or null: those below
  const float* grad_scale;
  const float* found_inf;
  double* sums;
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

// Gives a rule the sums of an entry's chunks.
template <class Rule>
__device__ __forceinline__ void take_sums(Rule& rule, const UpdateEntry& entry, const double* sums, int64_t chunk) {
  const int64_t n_chunks = divide_up(entry.numel, chunk);
  const double* const of_entry = sums + static_cast<int64_t>(entry.first_chunk) * kSumsOf<Rule>;
  double totals[kMaxSums] = {};
#pragma unroll
  for (int k = 0; k < kSumsOf<Rule>; ++k) {
    for (int64_t i = threadIdx.x; i < n_chunks; i += kUpdateThreads) totals[k] += of_entry[i * kSumsOf<Rule> + k];
    totals[k] = Group<true>::sum(totals[k]);
  }
  rule.take_sums(totals);
}

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

// Elements [begin, end) of an entry.
struct Chunk {
  const UpdateEntry& entry;
  int64_t begin, end;
};

template <int kCapacity>
__device__ __forceinline__ Chunk chunk_of_block(const UpdateArguments<kCapacity>& arguments,
                                                const UpdateEntry* entries) {
  const int chunk = static_cast<int>(blockIdx.x);
  const UpdateEntry& entry = entries[find_entry(entries, arguments.n_entries, chunk)];
  const int64_t begin = static_cast<int64_t>(chunk - entry.first_chunk) * arguments.chunk;
  const int64_t end = begin + arguments.chunk < entry.numel ? begin + arguments.chunk : entry.numel;
  return {entry, begin, end};
}

}  // namespace fastopt::cuda
