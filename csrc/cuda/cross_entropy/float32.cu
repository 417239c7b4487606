// The cross-entropy kernels for float logits.
#include "cuda/cross_entropy/launch_kernels.cuh"

namespace fastopt::cuda {

template int launch_cross_entropy<float>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);

}  // namespace fastopt::cuda
