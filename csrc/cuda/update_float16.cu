// The update kernels for float16 parameters.
#include "cuda/update_kernel.cuh"

namespace fastopt::cuda {

template int launch_update<Half, Half>(const Update&, cudaStream_t);
template int launch_update<Half, float>(const Update&, cudaStream_t);

}  // namespace fastopt::cuda
