// 16-byte accesses: several adjacent elements are loaded or stored by one instruction.
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
    return from_words(words);
  }
  __device__ __forceinline__ void store(S* to) const {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
  }

  // The same for global memory only. From sm_100 on, elements under 8 bytes use instructions that the compiler cannot
  // split: it would turn the load of a pack whose elements are then separated into four loads of 4 bytes. It does not
  // split other packs.
  static __device__ __forceinline__ Pack load_global(const S* from) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_word(reinterpret_cast<const uint4*>(from) + i);
    return from_words(words);
  }
  __device__ __forceinline__ void store_global(S* to) const {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<uint4*>(to) + i, words[i]);
  }

 private:
  static constexpr bool kIsNeverSplit = sizeof(S) == 8;

  static __device__ __forceinline__ Pack from_words(const uint4 (&words)[kWords]) {
    Pack pack;
    memcpy(&pack, words, sizeof(pack));
    return pack;
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static __device__ __forceinline__ uint4 load_word(const uint4* from) {
    if constexpr (kIsNeverSplit) {
      return *from;
    } else {
      uint4 word;
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                   : "l"(__cvta_generic_to_global(from))
                   : "memory");
      return word;
    }
  }
  static __device__ __forceinline__ void store_word(uint4* to, const uint4& word) {
    if constexpr (kIsNeverSplit) {
      *to = word;
    } else {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
                   "r"(word.y), "r"(word.z), "r"(word.w)
                   : "memory");
    }
  }
#else
  static __device__ __forceinline__ uint4 load_word(const uint4* from) { return *from; }
  static __device__ __forceinline__ void store_word(uint4* to, const uint4& word) { *to = word; }
#endif
};

}  // namespace fastopt::cuda
