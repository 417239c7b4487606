// The cross-entropy kernels for bfloat16 logits.
#include "cuda/cross_entropy/launch_kernels.cuh"

namespace fastopt::cuda {

template int launch_cross_entropy<BFloat16>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);

}  // namespace fastopt::cuda
