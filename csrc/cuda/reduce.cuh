// Reductions over a warp and over a block. The order of summation does not depend on scheduling.
#pragma once

#include "cuda/launch.h"

namespace fastopt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// The threads that share a row: a warp, or all warps of a block.
template <bool kIsBlock>
struct Group {
  __device__ static int rank() {
    return kIsBlock ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % kWarp;
  }
  __device__ static int size() { return kIsBlock ? static_cast<int>(blockDim.x) : kWarp; }

  // Orders the memory accesses of the group's threads before and after it.
  static __device__ __forceinline__ void sync() {
    if constexpr (kIsBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  template <class T>
  static __device__ __forceinline__ T max(T value) {
    value = warp_max(value);
    if constexpr (kIsBlock) value = warp_max(exchange(value, value));
    return value;
  }
  template <class T>
  static __device__ __forceinline__ T sum(T value) {
    value = warp_sum(value);
    if constexpr (kIsBlock) value = warp_sum(exchange(value, T(0)));
    return value;
  }

 private:
  // Gives each lane one warp's value; lanes beyond the number of warps get `none`.
  template <class T>
  static __device__ __forceinline__ T exchange(T value, T none) {
    __shared__ T of_warps[kWarp];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    __syncthreads();  // the last exchange has been read
    if (lane == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    return lane < static_cast<int>(blockDim.x) / kWarp ? of_warps[lane] : none;
  }
};

}  // namespace fastopt::cuda
