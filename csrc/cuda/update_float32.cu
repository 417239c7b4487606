// The update kernels for float parameters.
#include "cuda/update_kernel.cuh"

namespace fastopt::cuda {

template int launch_update<float, float>(const Update&, cudaStream_t);
template int launch_update<float, BFloat16>(const Update&, cudaStream_t);

}  // namespace fastopt::cuda
