// Launches the kernels of a cross-entropy as its plan says; compiled for each stored type in a file of its own.
#pragma once

#include "cuda/cross_entropy/plan.h"
#include "cuda/cross_entropy/positions.cuh"
#include "cuda/device.h"

namespace fastopt::cuda {

constexpr int kPrepareThreads = 1024;

template <auto kKernel>
int launch_kernel(const CrossEntropyPlan& plan, const CrossEntropyWork& work, cudaStream_t stream) {
  if (plan.shared_bytes > 0) {
    if (const int error = allow_all_shared_memory<kKernel>()) return error;
  }
  FASTOPT_LAUNCH(kKernel, plan.n_blocks, plan.n_threads, plan.shared_bytes, stream, work);
  return cudaGetLastError();
}

template <class S>
int launch_positions(const CrossEntropyPlan& plan, const CrossEntropyWork& work, cudaStream_t stream) {
  if (work.problem.kind() == TargetKind::kIndex) {
    return launch_kernel<cross_entropy_positions<S, true>>(plan, work, stream);
  }
  return launch_kernel<cross_entropy_positions<S, false>>(plan, work, stream);
}

template <class S, bool kIsUniform>
int launch_rows(const CrossEntropyPlan& plan, const CrossEntropyWork& work, cudaStream_t stream) {
  switch (plan.kernel) {
    case KernelKind::kPositions: return launch_positions<S>(plan, work, stream);
    case KernelKind::kWarpRows: return launch_kernel<cross_entropy_warp_rows<S, kIsUniform>>(plan, work, stream);
    case KernelKind::kBlockRows: return launch_kernel<cross_entropy_block_rows<S, kIsUniform>>(plan, work, stream);
    case KernelKind::kSplitRows: break;
  }
  const int error = launch_kernel<cross_entropy_split_sums<S, kIsUniform>>(plan, work, stream);
  if (error != cudaSuccess) return error;
  return launch_kernel<cross_entropy_split_rows<S, kIsUniform>>(plan, work, stream);
}

template <class S>
int launch_cross_entropy(const CrossEntropyPlan& plan, const CrossEntropyWork& work, cudaStream_t stream) {
  if (plan.n_tallies > 0) {
    FASTOPT_LAUNCH(tally_kernel<S>, plan.n_tallies, kPrepareThreads, 0, stream, work);
    if (const int error = cudaGetLastError()) return error;
  }
  if (work.totals) {
    FASTOPT_LAUNCH(prepare_kernel<S>, 1, kPrepareThreads, 0, stream, work);
    if (const int error = cudaGetLastError()) return error;
  }
  if (work.problem.kind() <= TargetKind::kIndexUniform) return launch_rows<S, true>(plan, work, stream);
  return launch_rows<S, false>(plan, work, stream);
}

extern template int launch_cross_entropy<double>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);
extern template int launch_cross_entropy<float>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);
extern template int launch_cross_entropy<BFloat16>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);
extern template int launch_cross_entropy<Half>(const CrossEntropyPlan&, const CrossEntropyWork&, cudaStream_t);

}  // namespace fastopt::cuda
