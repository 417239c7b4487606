// The update kernels for double parameters.
#include "cuda/update_kernel.cuh"

namespace fastopt::cuda {

template int launch_update<double, double>(const Update&, cudaStream_t);

}  // namespace fastopt::cuda
