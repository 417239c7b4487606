// The update kernels for bfloat16 parameters.
#include "cuda/update_kernel.cuh"

namespace fastopt::cuda {

template int launch_update<BFloat16, BFloat16>(const Update&, cudaStream_t);
template int launch_update<BFloat16, float>(const Update&, cudaStream_t);

}  // namespace fastopt::cuda
