// The CUDA side of an update: which tensors share a launch, and the tables the launches read.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "torch/cuda_library.h"
#include "update/tensor_update.h"

namespace fastopt {

// The numbers that a GradScaler leaves to an optimizer's step, on the device; either may be null.
struct Scaling {
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
};

// Launches updates on one device. Keeps what outlives a step: the ticket, and tables too long for a launch's arguments.
class CudaUpdater {
 public:
  // `updates` are those of this device, `rules` those of the whole step.
  void run(const std::vector<const TensorUpdate*>& updates, const std::vector<PackedRule>& rules,
           const Scaling& scaling, c10::Device device);

 private:
  struct Table {
    std::vector<cuda::UpdateEntry> entries;
    at::Tensor on_device;
  };

  void launch(std::vector<cuda::UpdateEntry>& entries, const std::vector<PackedRule>& rules, cuda::Update update,
              const CudaDevice& device, c10::Device where);
  const cuda::UpdateEntry* upload(const std::vector<cuda::UpdateEntry>& entries, c10::Device device);

  at::Tensor ticket_;
  std::vector<Table> tables_;  // in the order in which a step uploads them
  size_t n_uploaded_ = 0;
};

}  // namespace fastopt
