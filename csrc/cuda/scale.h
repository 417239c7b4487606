// The gradient of the loss times the loss's own gradient, which lies on the device.
#pragma once

#include "cuda/launch.h"
#include "cuda/library.h"

namespace fastopt::cuda {

int launch(const Scale& scale, cudaStream_t stream);

}  // namespace fastopt::cuda
