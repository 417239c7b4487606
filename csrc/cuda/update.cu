// Chooses the update kernel for an update's dtypes.
#include "cuda/update.h"

#include "cuda/update_kernel.cuh"

namespace fastopt::cuda {

int launch(const Update& update, cudaStream_t stream) {
  if (!has_update_kernel(update.param_dtype, update.state_dtype)) return cudaErrorInvalidValue;
  if (update.n_rules > kMaxRules || (!update.is_on_device && update.n_entries > kManyEntries)) {
    return cudaErrorInvalidValue;
  }
  const bool is_mixed = update.param_dtype != update.state_dtype;
  switch (update.param_dtype) {
    case DType::kFloat64: return launch_update<double, double>(update, stream);
    case DType::kFloat32:
      return is_mixed ? launch_update<float, BFloat16>(update, stream) : launch_update<float, float>(update, stream);
    case DType::kBFloat16:
      return is_mixed ? launch_update<BFloat16, float>(update, stream)
                      : launch_update<BFloat16, BFloat16>(update, stream);
    case DType::kFloat16:
      return is_mixed ? launch_update<Half, float>(update, stream) : launch_update<Half, Half>(update, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastopt::cuda
