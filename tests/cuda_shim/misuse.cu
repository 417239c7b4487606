// A kernel with an error for each that the shim must detect.
#include <cuda_runtime.h>

namespace {

constexpr unsigned kAllLanes = ~0u;

enum Misuse : int {
  kBarrierInBranch,
  kBarrierAndShuffle,
  kTwoBarriers,
  kLaneNotInMask,
  kExitedLaneInMask,
  kExitUnderShuffle,
  kTwoCollectives,
  kTwoMasks,
  kOddWidth,
  kTrap,
  kAssert,
  kOverrunDynamicShared,
  kUnderrunDynamicShared,
  kWritePastGlobal,
  kReadPastStaticShared,
  kReadPastDynamicShared,
  kMuchStaticShared,
};

// Two warps; 64 floats at `global` and in dynamic shared memory.
__global__ void misuse(Misuse misuse, volatile float* global, int one) {
  FASTOPT_DYNAMIC_SHARED(bytes);
  volatile float* shared = reinterpret_cast<volatile float*>(bytes);
  __shared__ volatile float fixed[64];
  __shared__ volatile double more[64];
  const unsigned thread = threadIdx.x;
  switch (misuse) {
    case kBarrierInBranch:
      if (thread < 16) __syncthreads();
      __syncwarp();
      break;
    case kBarrierAndShuffle:
      if (thread < 16) {
        __syncthreads();
      } else if (thread < 32) {
        __shfl_sync(kAllLanes, thread, 0);
      }
      break;
    case kTwoBarriers:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kLaneNotInMask: __shfl_sync(0x0000000fu, thread, 0); break;
    case kExitedLaneInMask:
      if (thread < 8) return;
      __ballot_sync(kAllLanes, 1);
      break;
    case kExitUnderShuffle:
      if (thread % 32 == 31) return;
      __shfl_down_sync(kAllLanes, thread, 1);
      break;
    case kTwoCollectives:
      if (thread % 2) {
        __shfl_sync(kAllLanes, thread, 0);
      } else {
        __ballot_sync(kAllLanes, 1);
      }
      break;
    case kTwoMasks: __any_sync(thread % 32 == 5 ? 0x0000003fu : kAllLanes, 1); break;
    case kOddWidth: __shfl_sync(kAllLanes, thread, 0, 24); break;
    case kTrap:
      if (thread == 33) __trap();
      break;
    case kAssert: assert(thread < 63); break;
    case kOverrunDynamicShared: shared[thread + one] = 1.0f; break;
    case kUnderrunDynamicShared: shared[static_cast<int>(thread) - one] = 1.0f; break;
    case kWritePastGlobal: global[thread + one] = 1.0f; break;
    case kReadPastStaticShared:
      fixed[thread] = 0.0f;
      global[thread] = fixed[thread + one];
      break;
    case kReadPastDynamicShared: global[thread] = shared[thread + one]; break;
    case kMuchStaticShared:
      more[thread] = 0.0;
      fixed[thread] = static_cast<float>(more[thread]);
      break;
  }
}

}  // namespace

extern "C" int do_misuse(int number) {
  float* global = new float[64]();
  FASTOPT_LAUNCH(misuse, 1, 64, 64 * sizeof(float), nullptr, static_cast<Misuse>(number), global, 1);
  delete[] global;
  return static_cast<int>(cudaGetLastError());
}
