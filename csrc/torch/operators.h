// The kernels of torch.ops.fastopt, for each device that has any.
#pragma once

#include <torch/library.h>

namespace fastopt {

void implement_updates(torch::Library& library);
void implement_cross_entropy(torch::Library& library);

}  // namespace fastopt
