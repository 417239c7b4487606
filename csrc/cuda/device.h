// Properties of the current device that launches need.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/launch.h"

namespace fastopt::cuda {

struct Device {
  int n_multiprocessors;
  int shared_bytes_per_multiprocessor;
  int max_shared_bytes_per_block;
};

// Returns a cudaError_t as a number.
inline int current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(&device->n_multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&device->max_shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

// Allows launches of a kernel to use all the shared memory that a block may have on the current device. Otherwise a
// kernel's static and dynamic shared memory together may not exceed 48 KiB. The limit is a property of kernel and
// device, shared by all host threads: each sets the same number, so none lowers it for another.
template <auto kKernel>
int allow_all_shared_memory() {
  static std::atomic<uint64_t> is_set{0};  // one bit for each device; for those after the 64th it is set every time
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (is_set.load(std::memory_order_acquire) & bit) return cudaSuccess;
  int max_bytes = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaDeviceGetAttribute(&max_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kKernel);
  if (error == cudaSuccess) {
    const int max_dynamic_bytes = max_bytes - static_cast<int>(attributes.sharedSizeBytes);
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_dynamic_bytes);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report it
    return error;
  }
  is_set.fetch_or(bit, std::memory_order_release);
  return cudaSuccess;
}

}  // namespace fastopt::cuda
