// The cross-entropy kernels for double logits.
#include "cuda/cross_entropy/launch_kernels.cuh"

namespace fastopt::cuda {

template int launch_cross_entropy<double>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);

}  // namespace fastopt::cuda
