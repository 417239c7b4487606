// Accesses of 16 bytes: several neighbouring elements loaded and stored as one, or as few, instructions.
#pragma once

#include "cuda/launch.h"

namespace fastopt::cuda {

constexpr int kAccessBytes = 16;

FASTOPT_HD bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0; }

// kN elements of a stored type, a whole number of accesses.
template <class S, int kN>
struct Pack {
  static constexpr int kWords = kN * static_cast<int>(sizeof(S)) / kAccessBytes;
  static_assert(kWords * kAccessBytes == kN * sizeof(S), "a pack is a whole number of accesses");
  S values[kN];

  // `from` and `to` must be aligned to 16 bytes.
  static __device__ __forceinline__ Pack load(const S* from) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    Pack pack;
    memcpy(&pack, words, sizeof(pack));
    return pack;
  }
  __device__ __forceinline__ void store(S* to) const {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
  }
};

}  // namespace fastopt::cuda
