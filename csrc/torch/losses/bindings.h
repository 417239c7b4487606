// The Python functions of the losses that do not go through the dispatcher.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastopt {

// Adds cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward) to the module.
void bind_cross_entropy(pybind11::module_& module);

// Adds cross_entropy_shard_totals and cross_entropy_shard_gradient, of logits whose classes are sharded over processes.
void bind_cross_entropy_shard(pybind11::module_& module);

}  // namespace fastopt
