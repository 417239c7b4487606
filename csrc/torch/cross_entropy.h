// Cross-entropy for torch: the operators' kernels, autograd, and the eager fast path.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastopt {

// Adds cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing) to the module.
void bind_cross_entropy(pybind11::module_& module);

}  // namespace fastopt
