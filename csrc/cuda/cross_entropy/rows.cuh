// The cross-entropy kernels of rows: a row to a warp, to a block or to several blocks.
#pragma once

#include "cuda/cross_entropy/call.cuh"

namespace fastopt::cuda {

// --- Rows ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ RowSlice<S> slice_of(const CrossEntropyProblem& p, int64_t row, int64_t first, int64_t n) {
  RowSlice<S> slice{};
  slice.logits = static_cast<const S*>(p.logits) + row * p.logits_layout.outer_stride + first;
  if (p.probabilities) {
    slice.probabilities = static_cast<const S*>(p.probabilities) + row * p.probabilities_layout.outer_stride + first;
  }
  if (p.grad) slice.grad = static_cast<gradient_t<S>*>(p.grad) + row * p.grad_layout.outer_stride + first;
  slice.n = n;
  slice.first_class = first;
  return slice;
}

enum class TargetStatus { kValid, kIgnored, kInvalid };

__device__ __forceinline__ TargetStatus status_of(const CrossEntropyProblem& p, int64_t target) {
  if (!p.target) return TargetStatus::kValid;
  if (target == p.ignore_index) return TargetStatus::kIgnored;
  return target >= 0 && target < p.logits_layout.n_classes ? TargetStatus::kValid : TargetStatus::kInvalid;
}

template <class S, class Group>
__device__ __forceinline__ compute_t<S> fill_skipped_row(const RowSlice<S>& slice, TargetStatus status) {
  using T = compute_t<S>;
  const T value = status == TargetStatus::kIgnored ? T(0) : std::numeric_limits<T>::quiet_NaN();
  if (slice.grad) fill_gradient<S, Group>(slice, value);
  return value;
}

// The loss and the gradient's constants, from the sums over a whole row.
template <class S, bool kIsUniform, class A>
__device__ __forceinline__ GradientConstants<compute_t<S>> finish_row(const CrossEntropyProblem& p,
                                                                      const CallConstants<S>& constants,
                                                                      RowSums<A> sums, int64_t target, A target_logit,
                                                                      compute_t<S>& loss) {
  using T = compute_t<S>;
  const TargetTerms<T>& terms = constants.smoothed.terms;
  const bool has_target = p.target != nullptr;
  const bool has_q_sums = constants.smoothed.kind != TargetKind::kIndex;
  const A uniform = kIsUniform ? static_cast<A>(terms.off) : A(0);  // 0 where nothing is smoothed
  A on = 0;
  if (has_target) {
    on = static_cast<A>(terms.on);
    if (terms.weight) on *= terms.weight[target];
    sums.q_sum = has_q_sums ? static_cast<A>(terms.smoothed_sum) : A(0);
  }
  loss = static_cast<T>(row_loss<A>(sums, std::log(sums.exp_sum), on, target_logit, has_target, has_q_sums));
  const A factor = constants.scale * (sums.q_sum + on) / sums.exp_sum;
  return {static_cast<T>(sums.max),
          static_cast<T>(factor),
          constants.scale,
          static_cast<T>(on),
          static_cast<T>(constants.scale * uniform),
          has_target ? target : -1};
}

// Computes one row by one group. The loss is valid in rank 0.
template <class S, bool kIsUniform, class Group>
__device__ __forceinline__ compute_t<S> compute_row(const CrossEntropyWork& work, const CallConstants<S>& constants,
                                                    int64_t row, S* stage) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = work.problem;
  const int64_t target = p.target ? p.target[row] : -1;
  RowSlice<S> slice = slice_of<S>(p, row, 0, p.logits_layout.n_classes);
  const TargetStatus status = status_of(p, target);
  if (status != TargetStatus::kValid) return fill_skipped_row<S, Group>(slice, status);
  if (stage) {
    slice.stage = stage + reinterpret_cast<uintptr_t>(slice.logits) % kAccessBytes / sizeof(S);
    Group::sync();  // the row before has been read
  }
  T target_logit = 0;
  if (p.target && Group::rank() == 0) target_logit = load(slice.logits[target]);
  const RowSums<T> sums = merge<Group>(sum_slice<S, kIsUniform, Group>(slice, constants.smoothed), constants.smoothed);
  T loss;
  const GradientConstants<T> gradient = finish_row<S, kIsUniform, T>(p, constants, sums, target, target_logit, loss);
  if (slice.grad) {
    Group::sync();  // the gradient may overwrite the logits
    write_gradient<S, kIsUniform, Group>(slice, constants.smoothed, gradient);
  }
  return loss;
}

template <class S, bool kIsUniform, bool kIsBlock>
__device__ __forceinline__ void compute_rows(const CrossEntropyWork& work) {
  using Threads = Group<kIsBlock>;
  FASTOPT_DYNAMIC_SHARED(shared);
  S* const stage = work.is_staged ? reinterpret_cast<S*>(shared) : nullptr;
  const CallConstants<S> constants = load_constants<S>(work);
  const CrossEntropyProblem& p = work.problem;
  const int groups_per_block = kIsBlock ? 1 : static_cast<int>(blockDim.x) / kWarp;
  const int own_group = kIsBlock ? 0 : static_cast<int>(threadIdx.x) / kWarp;
  const int64_t n_groups = static_cast<int64_t>(gridDim.x) * groups_per_block;
  double losses = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * groups_per_block + own_group; row < p.logits_layout.n_outer;
       row += n_groups) {
    const compute_t<S> loss = compute_row<S, kIsUniform, Threads>(work, constants, row, stage);
    if (Threads::rank() == 0) {
      losses += loss;
      if (p.losses) store(static_cast<S*>(p.losses)[row], loss);
    }
  }
  reduce_loss<S>(work, losses, constants.denominator);
}

// True for kernels that need fewer registers, so that more blocks fit a multiprocessor.
template <class S, bool kIsUniform>
constexpr bool is_light = kIsUniform && sizeof(S) < 8;

constexpr int kWarpRowsThreads = 256;

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kWarpRowsThreads, is_light<S, kIsUniform> ? 3 : 2)
    cross_entropy_warp_rows(const __grid_constant__ CrossEntropyWork work) {
  compute_rows<S, kIsUniform, false>(work);
}

constexpr int kMaxBlockRowsThreads = 512;

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kMaxBlockRowsThreads, is_light<S, kIsUniform> ? 2 : 1)
    cross_entropy_block_rows(const __grid_constant__ CrossEntropyWork work) {
  compute_rows<S, kIsUniform, true>(work);
}

// --- Few wide rows: several blocks per row, in two launches --------------------------------------------------------

constexpr int kSplitThreads = 512;

struct Split {
  int64_t row, first, n;
  int32_t index;
};

__device__ __forceinline__ Split split_of(const CrossEntropyWork& work) {
  const int64_t n_classes = work.problem.logits_layout.n_classes;
  const int64_t width = (n_classes + work.n_splits - 1) / work.n_splits;
  const int32_t index = static_cast<int32_t>(blockIdx.x % work.n_splits);
  const int64_t first = index * width < n_classes ? index * width : n_classes;
  const int64_t end = first + width < n_classes ? first + width : n_classes;
  return {static_cast<int64_t>(blockIdx.x / work.n_splits), first, end - first, index};
}

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kSplitThreads, 1)
    cross_entropy_split_sums(const __grid_constant__ CrossEntropyWork work) {
  using Block = Group<true>;
  using T = compute_t<S>;
  const CrossEntropyProblem& p = work.problem;
  const Split split = split_of(work);
  const int64_t target = p.target ? p.target[split.row] : -1;
  if (status_of(p, target) != TargetStatus::kValid) return;
  const CallConstants<S> constants = load_constants<S>(work);
  const RowSlice<S> slice = slice_of<S>(p, split.row, split.first, split.n);
  RowPart<T> part{merge<Block>(sum_slice<S, kIsUniform, Block>(slice, constants.smoothed), constants.smoothed), T(0)};
  if (threadIdx.x != 0) return;
  if (target >= split.first && target < split.first + split.n) {
    part.target_logit = load(slice.logits[target - split.first]);
  }
  static_cast<RowPart<T>*>(work.parts)[blockIdx.x] = part;
}

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kSplitThreads, 1)
    cross_entropy_split_rows(const __grid_constant__ CrossEntropyWork work) {
  using Block = Group<true>;
  using Warp = Group<false>;
  using T = compute_t<S>;
  const CrossEntropyProblem& p = work.problem;
  const Split split = split_of(work);
  const int64_t target = p.target ? p.target[split.row] : -1;
  const CallConstants<S> constants = load_constants<S>(work);
  const RowSlice<S> slice = slice_of<S>(p, split.row, split.first, split.n);
  const TargetStatus status = status_of(p, target);
  T loss = 0;
  if (status != TargetStatus::kValid) {
    loss = fill_skipped_row<S, Block>(slice, status);
  } else {
    // Each warp adds up all parts of the row.
    const auto* parts = static_cast<const RowPart<T>*>(work.parts) + split.row * work.n_splits;
    RowSums<T> sums{std::numeric_limits<T>::lowest()};
    T target_logit = 0;
    for (int i = Warp::rank(); i < work.n_splits; i += kWarp) {
      add(sums, parts[i].sums);
      target_logit += parts[i].target_logit;  // 0 in all parts but one
    }
    sums = merge<Warp>(sums, constants.smoothed);
    target_logit = Warp::sum(target_logit);
    const GradientConstants<T> gradient = finish_row<S, kIsUniform, T>(p, constants, sums, target, target_logit, loss);
    if (slice.grad) write_gradient<S, kIsUniform, Block>(slice, constants.smoothed, gradient);
  }
  const bool is_first = threadIdx.x == 0 && split.index == 0;
  if (is_first && p.losses) store(static_cast<S*>(p.losses)[split.row], loss);
  reduce_loss<S>(work, is_first ? static_cast<double>(loss) : 0, constants.denominator);
}

}  // namespace fastopt::cuda
