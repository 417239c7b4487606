// Constants that all rows of a call share, and the reduction of their losses.
#pragma once

#include "cuda/cross_entropy/row.cuh"

namespace fastopt::cuda {

struct Totals {
  double denominator;  // of the mean over class indices: summed weights of the targets that are not ignored
  double weight_sum;   // of all classes
  uint32_t ticket;     // blocks that are done
  uint32_t unused;
};

// The sums over one part of a row that several blocks share.
template <class T>
struct RowPart {
  RowSums<T> sums;
  T target_logit;
};

// A call, with pointers into its workspace.
struct CrossEntropyWork {
  CrossEntropyProblem problem;
  Reduction reduction;
  void* loss;
  Totals* totals;    // written by prepare_kernel; null if a single block computes them itself
  double* partials;  // of each block: its rows' losses
  double* tallies;   // of each block of tally_kernel
  void* parts;       // RowPart of each row and split
  int32_t n_tallies;
  int32_t n_splits;
  bool is_staged;  // logits are kept in shared memory between the two sweeps
};

template <class S>
__device__ __forceinline__ double sum_target_weights(const CrossEntropyProblem& p, int64_t first, int64_t step) {
  const int64_t n = p.logits_layout.n_outer * p.logits_layout.n_inner;
  const auto* weight = static_cast<const compute_t<S>*>(p.weight);
  double sum = 0;
#pragma unroll 4
  for (int64_t i = first; i < n; i += step) {
    const int64_t t = p.target[i];
    if (t != p.ignore_index && t >= 0 && t < p.logits_layout.n_classes) sum += weight ? weight[t] : 1;
  }
  return sum;
}

// Computed by all threads of a block together; each gets the result.
template <class S>
__device__ __forceinline__ Totals find_totals(const CrossEntropyWork& work) {
  using Block = Group<true>;
  const CrossEntropyProblem& p = work.problem;
  Totals totals{};
  if (p.target && work.reduction == Reduction::kMean) {
    double sum = 0;
    if (work.n_tallies > 0) {
      for (int i = Block::rank(); i < work.n_tallies; i += Block::size()) sum += work.tallies[i];
    } else {
      sum = sum_target_weights<S>(p, Block::rank(), Block::size());
    }
    totals.denominator = Block::sum(sum);
  }
  totals.weight_sum = static_cast<double>(p.logits_layout.n_classes);
  if (p.target && p.weight && p.label_smoothing != 0) {
    const auto* weight = static_cast<const compute_t<S>*>(p.weight);
    double sum = 0;
    for (int64_t c = Block::rank(); c < p.logits_layout.n_classes; c += Block::size()) sum += weight[c];
    totals.weight_sum = Block::sum(sum);
  }
  return totals;
}

// Constants of a call for the arithmetic of each row.
template <class S>
struct CallConstants {
  using T = compute_t<S>;
  SmoothedTarget<T> smoothed;
  T scale;             // of the gradient
  double denominator;  // of the reduced loss
};

template <class S>
__device__ __forceinline__ CallConstants<S> load_constants(const CrossEntropyWork& work) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = work.problem;
  const Totals totals = work.totals ? *work.totals : find_totals<S>(work);
  double denominator = 1;
  if (work.reduction == Reduction::kMean) {
    denominator =
        p.target ? totals.denominator : static_cast<double>(p.logits_layout.n_outer * p.logits_layout.n_inner);
    // 0 / 0, whatever is smoothed over other classes.
    if (denominator == 0) denominator = std::numeric_limits<double>::quiet_NaN();
  }
  const double off = p.label_smoothing / static_cast<double>(p.logits_layout.n_classes);
  const double keep = 1 - p.label_smoothing;
  return {{p.kind(), {keep, off * totals.weight_sum, T(off), T(keep), static_cast<const T*>(p.weight)}},
          T(1 / denominator),
          denominator};
}

// Adds a block's part of the reduced loss; the last block to finish adds up all parts, in their order.
template <class S>
__device__ __forceinline__ void reduce_loss(const CrossEntropyWork& work, double losses, double denominator) {
  using Block = Group<true>;
  if (work.reduction == Reduction::kNone) return;
  double sum = Block::sum(losses);
  if (gridDim.x > 1) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
      work.partials[blockIdx.x] = sum;
      __threadfence();
      is_last = atomicAdd(&work.totals->ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    sum = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += __ldcg(work.partials + i);
    sum = Block::sum(sum);
  }
  if (threadIdx.x == 0) store(*static_cast<S*>(work.loss), static_cast<compute_t<S>>(sum / denominator));
}

template <class S>
__global__ void __launch_bounds__(1024) tally_kernel(const __grid_constant__ CrossEntropyWork work) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const double sum = sum_target_weights<S>(work.problem, first, static_cast<int64_t>(gridDim.x) * blockDim.x);
  const double total = Group<true>::sum(sum);
  if (threadIdx.x == 0) work.tallies[blockIdx.x] = total;
}

template <class S>
__global__ void __launch_bounds__(1024) prepare_kernel(const __grid_constant__ CrossEntropyWork work) {
  const Totals totals = find_totals<S>(work);
  if (threadIdx.x == 0) *work.totals = totals;
}

}  // namespace fastopt::cuda
