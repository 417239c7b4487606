// Kernels that test the shim itself. Those with errors that it must detect are in misuse.cu.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr unsigned kAllLanes = ~0u;

int last_error() { return static_cast<int>(cudaGetLastError()); }

__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Sums each row of n values. Without its second barrier, a warp may overwrite what another has yet to read.
template <bool kBarrierAfterWrite, bool kBarrierAfterRead>
__global__ void __launch_bounds__(1024)
    row_sums(const float* __restrict__ in, float* __restrict__ out, int rows, int n) {
  __shared__ float partial[32];
  const int warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize, warps = blockDim.x / warpSize;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += __ldg(&in[row * n + i]);
    sum = warp_sum(sum);
    if (lane == 0) partial[warp] = sum;
    if (kBarrierAfterWrite) __syncthreads();
    sum = warp_sum(lane < warps ? partial[lane] : 0.0f);
    if (kBarrierAfterRead) __syncthreads();
    // Each warp adds its share, so that each must have read all partial sums.
    if (lane == 0) atomicAdd(&out[row], sum / warps);
  }
}

template <bool kBarrier>
__global__ void reverse_in_warp(int* values) {
  __shared__ int staged[32];
  staged[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) __syncwarp();
  values[threadIdx.x] = staged[31 - threadIdx.x];
}

__global__ void count_thread(unsigned* count) { atomicAdd(count, 1); }

__global__ void index_threads(int* ranks) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&ranks[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

__global__ void list_in_order(int* order, unsigned* n, bool blocks) {
  order[atomicAdd(n, 1)] = static_cast<int>(blocks ? blockIdx.x : threadIdx.x);
}

__global__ void list_twice(int* order, unsigned* n) {
  order[atomicAdd(n, 1)] = static_cast<int>(threadIdx.x);
  if (blockDim.x == warpSize) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  order[atomicAdd(n, 1)] = static_cast<int>(threadIdx.x);
}

struct Table {
  int values[1000];
};

__global__ void read_table(const __grid_constant__ Table table, Table* original, int* read) {
  original->values[999] = 2;
  read[blockIdx.x * blockDim.x + threadIdx.x] = table.values[999];
}

// What shared memory holds when a block begins; then zeros, which the next block must not find.
__global__ void look_at_shared(float* found) {
  __shared__ float fixed[64];
  FASTOPT_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  const unsigned i = threadIdx.x, at = (blockIdx.x * blockDim.x + i) * 2;
  found[at] = fixed[i];
  found[at + 1] = shared[i];
  fixed[i] = shared[i] = 0.0f;
}

// Only the first `n` lanes take part.
__global__ void exchange(int kind, unsigned mask, int argument, int width, const int64_t* in, int64_t* out) {
  const unsigned lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int64_t value = in[lane];
  const int small = static_cast<int>(value);
  switch (kind) {
    case 0: out[lane] = __shfl_sync(mask, value, argument, width); break;
    case 1: out[lane] = __shfl_up_sync(mask, value, argument, width); break;
    case 2: out[lane] = __shfl_down_sync(mask, value, argument, width); break;
    case 3: out[lane] = __shfl_xor_sync(mask, value, argument, width); break;
    case 4: out[lane] = __ballot_sync(mask, value > argument); break;
    case 5: out[lane] = __any_sync(mask, value > argument); break;
    case 6: out[lane] = __all_sync(mask, value > argument); break;
    case 7: out[lane] = __reduce_add_sync(mask, small); break;
    case 8: out[lane] = __reduce_min_sync(mask, small); break;
    case 9: out[lane] = __reduce_max_sync(mask, small); break;
    case 10: out[lane] = __reduce_max_sync(mask, static_cast<unsigned>(value)); break;
    case 11: out[lane] = __reduce_xor_sync(mask, static_cast<unsigned>(value)); break;
  }
}

// Threads from `live` on exit; the others synchronise their warps, then vote.
__global__ void vote(int live, int threshold, int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= live) return;
  __syncwarp();
  out[thread * 3] = __syncthreads_count(thread < threshold);
  out[thread * 3 + 1] = __syncthreads_and(thread < threshold);
  out[thread * 3 + 2] = __syncthreads_or(thread < threshold);
}

__global__ void step_counters(unsigned* up, unsigned* down, unsigned bound, unsigned* seen) {
  seen[atomicInc(up, bound)] += 1;
  atomicDec(down, bound);
}

// The last block to finish adds what all have written.
__global__ void sum_in_last_block(int* partial, unsigned* done, int* sum) {
  partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  __threadfence();
  if (atomicInc(done, gridDim.x - 1) != gridDim.x - 1) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += partial[i];
}

thread_local int launches_of_this_thread = 0;

}  // namespace

extern "C" {

int sum_rows(int kind, const float* in, float* out, int rows, int n, int blocks, int threads) {
  ++launches_of_this_thread;
  switch (kind) {
    case 0: FASTOPT_LAUNCH((row_sums<true, true>), blocks, threads, 0, nullptr, in, out, rows, n); break;
    case 1: FASTOPT_LAUNCH((row_sums<false, true>), blocks, threads, 0, nullptr, in, out, rows, n); break;
    case 2: FASTOPT_LAUNCH((row_sums<true, false>), blocks, threads, 0, nullptr, in, out, rows, n); break;
  }
  return last_error();
}

int launches_here() { return launches_of_this_thread; }

int reverse(int barrier, int* values) {
  if (barrier) {
    FASTOPT_LAUNCH(reverse_in_warp<true>, 1, 32, 0, nullptr, values);
  } else {
    FASTOPT_LAUNCH(reverse_in_warp<false>, 1, 32, 0, nullptr, values);
  }
  return last_error();
}

// A kernel's static shared memory and its limit of dynamic shared memory.
int shared_bytes(int* fixed, int* limit) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, count_thread);
  *fixed = static_cast<int>(attributes.sharedSizeBytes);
  *limit = attributes.maxDynamicSharedSizeBytes;
  return error;
}

// Returns the error; `allowed` < 0 leaves the kernel's limit of dynamic shared memory as it is.
int launch_shape(const unsigned* blocks, const unsigned* threads, int shared_bytes, int allowed, unsigned* count) {
  if (allowed >= 0) {
    const cudaError_t error = cudaFuncSetAttribute(count_thread, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return last_error() == error ? error : -1;
  }
  FASTOPT_LAUNCH(count_thread, dim3(blocks[0], blocks[1], blocks[2]), dim3(threads[0], threads[1], threads[2]),
                 shared_bytes, nullptr, count);
  return cudaPeekAtLastError() == cudaSuccess ? last_error() : last_error() + 1000 * cudaPeekAtLastError();
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

int index_all(const unsigned* blocks, const unsigned* threads, int* ranks) {
  FASTOPT_LAUNCH(index_threads, dim3(blocks[0], blocks[1], blocks[2]), dim3(threads[0], threads[1], threads[2]), 0,
                 nullptr, ranks);
  return last_error();
}

int list_order(int blocks, int threads, int* order) {
  unsigned n = 0;
  FASTOPT_LAUNCH(list_in_order, blocks, threads, 0, nullptr, order, &n, blocks > 1);
  return last_error();
}

int list_order_twice(int threads, int* order) {
  unsigned n = 0;
  FASTOPT_LAUNCH(list_twice, 1, threads, 0, nullptr, order, &n);
  return last_error();
}

int copy_table(int blocks, int threads, int* read) {
  Table table{};
  table.values[999] = 1;
  FASTOPT_LAUNCH(read_table, blocks, threads, 0, nullptr, table, &table, read);
  return last_error();
}

int look(int blocks, float* found) {
  FASTOPT_LAUNCH(look_at_shared, blocks, 64, 64 * sizeof(float), nullptr, found);
  return last_error();
}

int exchange_lanes(int kind, unsigned mask, int argument, int width, const int64_t* in, int64_t* out) {
  FASTOPT_LAUNCH(exchange, 1, 32, 0, nullptr, kind, mask, argument, width, in, out);
  return last_error();
}

int vote_of(int threads, int live, int threshold, int* out) {
  FASTOPT_LAUNCH(vote, 1, threads, 0, nullptr, live, threshold, out);
  return last_error();
}

int step(int threads, unsigned* up, unsigned* down, unsigned bound, unsigned* seen) {
  FASTOPT_LAUNCH(step_counters, 1, threads, 0, nullptr, up, down, bound, seen);
  return last_error();
}

int last_block(int blocks, int* partial, unsigned* done, int* sum) {
  FASTOPT_LAUNCH(sum_in_last_block, blocks, 1, 0, nullptr, partial, done, sum);
  return last_error();
}

int multiprocessors() {
  int device = -1, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // extern "C"
