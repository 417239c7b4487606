// The update of many tensors in one launch.
#pragma once

#include "cuda/launch.h"
#include "cuda/library.h"

namespace fastopt::cuda {

int launch(const Update& update, cudaStream_t stream);

}  // namespace fastopt::cuda
