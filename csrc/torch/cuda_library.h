// Opens the CUDA library at run time, and calls it on torch's current stream of a tensor's device.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <string>

#include "cuda/library.h"
#include "torch/context.h"

namespace fastopt {

// The loaded library. Must be called only for tensors whose backend is kCuda: then there is one.
const cuda::Library& cuda_library();

// Makes a device the current one, and finds torch's current stream of it.
class CudaDevice {
 public:
  explicit CudaDevice(c10::Device device);
  cuda::Stream stream() const { return stream_; }
  bool is_capturing() const;
  int multiprocessors() const;

 private:
  c10::Device device_;
  c10::OptionalDeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

// Raises RuntimeError for an error of the library; `what` names the operation and its sizes.
void check_cuda(int error, const std::string& what, c10::Device device);

}  // namespace fastopt
