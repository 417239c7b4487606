// One optimizer step from Python's own objects: param_groups and state are read anew each step, so nothing goes stale.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastopt {

// Adds the class StepPlan to the module.
void bind_step_plan(pybind11::module_& module);

}  // namespace fastopt
