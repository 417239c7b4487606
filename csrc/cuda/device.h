// What launches ask of the current device.
#pragma once

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

}  // namespace fastopt::cuda
