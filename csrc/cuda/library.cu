// The library's one exported function.
#include "cuda/library.h"

#include "cuda/cross_entropy/plan.h"
#include "cuda/device.h"
#include "cuda/scale.h"
#include "cuda/update.h"

// The architectures that this build contains, defined on the compiler's command line.
#ifndef FASTOPT_CUDA_ARCHITECTURES
#define FASTOPT_CUDA_ARCHITECTURES ""
#endif

namespace fastopt::cuda {
namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

// Kernels with more than 4096 bytes of arguments need a driver for CUDA 12.1. An older one may serve the runtime all
// the same, as each driver does for all of its major version.
constexpr int kOldestDriver = 12010;
constexpr int kDriverTooOld = -1;  // none of the runtime's errors

const char* error_text(int error) {
  if (error == kDriverTooOld) return "the driver is older than CUDA 12.1, which kernels with 32 KB of arguments need";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int probe() {
  int n_devices = 0, driver = 0;
  cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  cudaGetLastError();  // clears the error, or the next launch would report it
  if (error != cudaSuccess) return error;
  if (n_devices == 0) return cudaErrorNoDevice;
  return driver >= kOldestDriver ? cudaSuccess : kDriverTooOld;
}

int is_capturing(Stream stream, bool* is_capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(native(stream), &status);
  *is_capturing = status != cudaStreamCaptureStatusNone;
  return error;
}

int multiprocessors(int* count) {
  Device device;
  const int error = current_device(&device);
  *count = device.n_multiprocessors;
  return error;
}

const Library kLibrary{
    kInterfaceVersion,
#ifdef FASTOPT_CUDA_HOST_SHIM
    true,
#else
    false,
#endif
    FASTOPT_CUDA_ARCHITECTURES,
    error_text,
    probe,
    is_capturing,
    multiprocessors,
    [](const Update& update, Stream stream) { return launch(update, native(stream)); },
    workspace_bytes,
    [](const CrossEntropy& call, Stream stream) { return launch(call, native(stream)); },
    [](const Scale& scale, Stream stream) { return launch(scale, native(stream)); },
};

}  // namespace
}  // namespace fastopt::cuda

#if defined(_WIN32)
#define FASTOPT_EXPORT __declspec(dllexport)
#else
#define FASTOPT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" FASTOPT_EXPORT const fastopt::cuda::Library* fastopt_cuda_library() { return &fastopt::cuda::kLibrary; }
