// The runtime calls of launch code, for a device of compute capability 9.0 whose memory is the host's.
#pragma once

#include <cstddef>
#include <cstdlib>  // getenv, atoi
#include <cstring>  // memcpy, memset
#include <mutex>

#include "grid.h"
#include "runtime_types.h"

// Errors

inline cudaError_t cudaPeekAtLastError() { return fastopt_shim::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(fastopt_shim::last_error, cudaSuccess); }

namespace [[gnu::visibility("hidden")]] fastopt_shim {

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

inline ErrorText describe(cudaError_t error) {
  static constexpr ErrorText kErrors[] = {
      {cudaSuccess, "cudaSuccess", "no error"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
      {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
      {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
       "CUDA driver version is insufficient for CUDA runtime version"},
      {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
      {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
      {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
      {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
       "no kernel image is available for execution on the device"},
      {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
      {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
      {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
      {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
      {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
      {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
      {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
       "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
       "operation failed due to a previous error during capture"},
      {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
  };
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known;
  }
  return {error, "unrecognized error code", "unrecognized error code"};
}

}  // namespace fastopt_shim

inline const char* cudaGetErrorName(cudaError_t error) { return fastopt_shim::describe(error).name; }
inline const char* cudaGetErrorString(cudaError_t error) { return fastopt_shim::describe(error).text; }

// Memory and streams

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Device

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return fastopt_shim::record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
namespace [[gnu::visibility("hidden")]] fastopt_shim {

inline int number_from_environment(const char* name, int otherwise) {
  const char* value = getenv(name);
  const int number = value ? atoi(value) : 0;
  return number > 0 ? number : otherwise;
}

// Few, so that grids sized to the device stay small.
inline int multiprocessors() { return number_from_environment("FASTOPT_SHIM_MULTIPROCESSORS", 4); }

}  // namespace fastopt_shim

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fastopt_shim::number_from_environment("FASTOPT_SHIM_DRIVER", 13000);
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return fastopt_shim::record(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = fastopt_shim::kMaxThreads; break;
    case cudaDevAttrMaxBlockDimZ: *value = fastopt_shim::kMaxThreadsZ; break;
    case cudaDevAttrMaxGridDimX: *value = fastopt_shim::kMaxBlocksX; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = fastopt_shim::kMaxBlocksYZ; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(fastopt_shim::kDefaultSharedBytesLimit); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(fastopt_shim::kMaxSharedBytesOptIn); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1 << 10; break;
    case cudaDevAttrTotalConstantMemory: *value = 64 << 10; break;
    case cudaDevAttrWarpSize: *value = fastopt_shim::kWarpSize; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 64 << 10; break;
    case cudaDevAttrMultiProcessorCount: *value = fastopt_shim::multiprocessors(); break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: return fastopt_shim::record(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// Kernels

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) {
    return fastopt_shim::record(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(fastopt_shim::launch_mutex);
  return fastopt_shim::record(
      fastopt_shim::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value)));
}

template <class... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params...)) {
  const std::lock_guard lock(fastopt_shim::launch_mutex);
  const size_t limit = fastopt_shim::dynamic_shared_limit(reinterpret_cast<const void*>(kernel));
  *attributes = {fastopt_shim::kStaticSharedBytes, static_cast<int>(limit)};
  return cudaSuccess;
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, void (*)(Params...), int /*threads*/,
                                                          size_t /*shared_bytes*/) {
  *n_blocks = 2;
  return cudaSuccess;
}
