// Functions that Python calls without the dispatcher, added to the module by the file that defines them.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastopt {

// Adds cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward).
void bind_cross_entropy(pybind11::module_& module);

// Adds a function for each pointwise loss, such as mse_loss(input, target, reduction).
void bind_pointwise_losses(pybind11::module_& module);
// Adds to the numbers of kernel calls those of each pointwise loss.
void add_pointwise_calls(pybind11::dict& calls);

// Adds cross_entropy_shard_totals and cross_entropy_shard_gradient, for logits whose classes are sharded over
// processes.
void bind_cross_entropy_shard(pybind11::module_& module);

// Adds load_cuda, load_host_shim and cuda_architectures.
void bind_cuda_library(pybind11::module_& module);

}  // namespace fastopt
