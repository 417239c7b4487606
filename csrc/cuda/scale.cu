// Multiplies an array by a number on the device; does nothing if that is 1 and the array is scaled in place.
#include "cuda/scale.h"

#include <algorithm>    // max, min
#include <type_traits>  // is_same_v

#include "cuda/device.h"
#include "cuda/pack.h"

namespace fastopt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kRounds = 4;

struct ScaleWork {
  Scale scale;
  bool is_aligned;
};

__device__ __forceinline__ double factor_of(const Scale& scale) {
  switch (scale.factor_dtype) {
    case DType::kFloat64: return load(*static_cast<const double*>(scale.factor));
    case DType::kFloat32: return load(*static_cast<const float*>(scale.factor));
    case DType::kBFloat16: return load(*static_cast<const BFloat16*>(scale.factor));
    default: return load(*static_cast<const Half*>(scale.factor));
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleWork work) {
  using T = compute_t<To>;
  const Scale& scale = work.scale;
  const T factor = static_cast<T>(factor_of(scale));
  if (std::is_same_v<From, To> && factor == T(1) && scale.from == scale.to) return;
  const From* from = static_cast<const From*>(scale.from);
  To* to = static_cast<To*>(scale.to);
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  const int64_t rank = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t n_packs = work.is_aligned ? scale.n / kVector : 0;
  for (int64_t pack = rank; pack < n_packs; pack += kRounds * size) {
    Pack<From, kVector> values[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      // A pack beyond the last is replaced by the last, so that all loads are unconditional.
      const int64_t i = pack + r * size < n_packs ? pack + r * size : n_packs - 1;
      values[r] = Pack<From, kVector>::load(from + i * kVector);
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      Pack<To, kVector> scaled;
#pragma unroll
      for (int k = 0; k < kVector; ++k) store(scaled.values[k], static_cast<T>(load(values[r].values[k])) * factor);
      if (pack + r * size < n_packs) scaled.store(to + (pack + r * size) * kVector);
    }
  }
  for (int64_t i = n_packs * kVector + rank; i < scale.n; i += size) {
    store(to[i], static_cast<T>(load(from[i])) * factor);
  }
}

template <class From, class To>
int launch_scale(const Scale& scale, cudaStream_t stream) {
  Device device;
  if (const int error = current_device(&device)) return error;
  if (scale.n == 0) return cudaSuccess;
  const int64_t wanted = (scale.n + kThreads * kRounds * 4 - 1) / (kThreads * kRounds * 4);
  const int n_blocks = static_cast<int>(std::min<int64_t>(wanted, device.n_multiprocessors * kBlocksPerMultiprocessor));
  const ScaleWork work{scale, is_aligned(scale.from) && is_aligned(scale.to)};
  FASTOPT_LAUNCH((scale_kernel<From, To>), n_blocks, kThreads, 0, stream, work);
  return cudaGetLastError();
}

}  // namespace

int launch(const Scale& scale, cudaStream_t stream) {
  const bool is_same = scale.from_dtype == scale.to_dtype;
  switch (scale.to_dtype) {
    case DType::kFloat64: return is_same ? launch_scale<double, double>(scale, stream) : cudaErrorInvalidValue;
    case DType::kFloat32: return is_same ? launch_scale<float, float>(scale, stream) : cudaErrorInvalidValue;
    case DType::kBFloat16: return is_same ? launch_scale<BFloat16, BFloat16>(scale, stream) : cudaErrorInvalidValue;
    case DType::kFloat16:
      if (is_same) return launch_scale<Half, Half>(scale, stream);
      return scale.from_dtype == DType::kFloat32 ? launch_scale<float, Half>(scale, stream) : cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastopt::cuda
