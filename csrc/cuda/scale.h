// Multiplies the gradient of a loss by the loss's own gradient, a number on the device.
#pragma once

#include "cuda/launch.h"
#include "cuda/library.h"

namespace fastopt::cuda {

int launch(const Scale& scale, cudaStream_t stream);

}  // namespace fastopt::cuda
