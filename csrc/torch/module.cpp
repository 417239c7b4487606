// The Python module: what Python calls without the dispatcher. Operators register themselves in their own files.
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/isa.h"
#include "cpu/streaming.h"
#include "torch/bindings.h"
#include "torch/context.h"
#include "torch/large_arrays.h"
#include "torch/optim/step_plan.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("instruction_set", &fastopt::cpu::instruction_set);
  module.def("kernel_calls", [] {
    pybind11::dict calls;
    calls["update"] = fastopt::kernel_calls().update.load();
    calls["threaded_gather"] = fastopt::kernel_calls().threaded_gather.load();
    calls["cross_entropy"] = fastopt::kernel_calls().cross_entropy.load();
    calls["torch_cross_entropy"] = fastopt::kernel_calls().torch_cross_entropy.load();
    calls["cuda"] = fastopt::kernel_calls().cuda.load();
    fastopt::add_pointwise_calls(calls);
    return calls;
  });
  module.def("set_streaming_threshold", &fastopt::cpu::set_streaming_threshold);
  module.def("empty_cache", &fastopt::release_kept_block);
  fastopt::bind_cross_entropy(module);
  fastopt::bind_cross_entropy_shard(module);
  fastopt::bind_pointwise_losses(module);
  fastopt::bind_cuda_library(module);
  fastopt::bind_step_plan(module);
}
