// Cross-entropy of logits whose classes are sharded over processes: the part that each process computes.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastopt {

// Adds cross_entropy_shard_totals and cross_entropy_shard_gradient to the module.
void bind_cross_entropy_shard(pybind11::module_& module);

}  // namespace fastopt
