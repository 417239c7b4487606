// The cross-entropy kernels of rows: a row to a warp, to a block or to several blocks.
#pragma once

#include "cuda/cross_entropy_scene.cuh"

namespace fastopt::cuda {

// --- Rows ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ Stretch<S> stretch_of(const CrossEntropyProblem& p, int64_t row, int64_t first, int64_t n) {
  Stretch<S> stretch{};
  stretch.logits = static_cast<const S*>(p.logits) + row * p.logits_layout.outer_stride + first;
  if (p.probabilities) {
    stretch.probabilities = static_cast<const S*>(p.probabilities) + row * p.probabilities_layout.outer_stride + first;
  }
  if (p.grad) stretch.grad = static_cast<gradient_t<S>*>(p.grad) + row * p.grad_layout.outer_stride + first;
  stretch.n = n;
  stretch.first_class = first;
  return stretch;
}

enum class RowFate { kKept, kIgnored, kBad };

__device__ __forceinline__ RowFate fate_of(const CrossEntropyProblem& p, int64_t target) {
  if (!p.target) return RowFate::kKept;
  if (target == p.ignore_index) return RowFate::kIgnored;
  return target >= 0 && target < p.logits_layout.n_classes ? RowFate::kKept : RowFate::kBad;
}

template <class S, class Group>
__device__ __forceinline__ compute_t<S> give_up_row(const Stretch<S>& stretch, RowFate fate) {
  using T = compute_t<S>;
  const T value = fate == RowFate::kIgnored ? T(0) : std::numeric_limits<T>::quiet_NaN();
  if (stretch.grad) fill_gradient<S, Group>(stretch, value);
  return value;
}

// Loss and the gradient's constants, from the sums of a whole row.
template <class S, bool kIsUniform, class A>
__device__ __forceinline__ GradientOf<compute_t<S>> finish_row(const CrossEntropyProblem& p, const Scene<S>& scene,
                                                               RowSums<A> sums, int64_t target, A target_logit,
                                                               compute_t<S>& loss) {
  using T = compute_t<S>;
  const TargetTerms<T>& terms = scene.spread.terms;
  const bool has_target = p.target != nullptr;
  const bool has_spread = scene.spread.kind != TargetKind::kIndex;
  const A uniform = kIsUniform ? static_cast<A>(terms.off) : A(0);  // 0 where nothing is smoothed
  A on = 0;
  if (has_target) {
    on = static_cast<A>(terms.on);
    if (terms.weight) on *= terms.weight[target];
    sums.q_sum = has_spread ? static_cast<A>(terms.spread_sum) : A(0);
  }
  loss = static_cast<T>(row_loss<A>(sums, std::log(sums.exp_sum), on, target_logit, has_target, has_spread));
  const A factor = scene.scale * (sums.q_sum + on) / sums.exp_sum;
  return {static_cast<T>(sums.max),
          static_cast<T>(factor),
          scene.scale,
          static_cast<T>(on),
          static_cast<T>(scene.scale * uniform),
          has_target ? target : -1};
}

// One row by one group. The loss is right in rank 0.
template <class S, bool kIsUniform, class Group>
__device__ __forceinline__ compute_t<S> do_row(const CrossEntropyWork& work, const Scene<S>& scene, int64_t row,
                                               S* stage) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = work.problem;
  const int64_t target = p.target ? p.target[row] : -1;
  Stretch<S> stretch = stretch_of<S>(p, row, 0, p.logits_layout.n_classes);
  const RowFate fate = fate_of(p, target);
  if (fate != RowFate::kKept) return give_up_row<S, Group>(stretch, fate);
  if (stage) {
    stretch.stage = stage + reinterpret_cast<uintptr_t>(stretch.logits) % kAccessBytes / sizeof(S);
    Group::sync();  // the row before has been read
  }
  T target_logit = 0;
  if (p.target && Group::rank() == 0) target_logit = load(stretch.logits[target]);
  const RowSums<T> sums = merge<Group>(sum_stretch<S, kIsUniform, Group>(stretch, scene.spread), scene.spread);
  T loss;
  const GradientOf<T> of = finish_row<S, kIsUniform, T>(p, scene, sums, target, target_logit, loss);
  if (stretch.grad) {
    Group::sync();  // the gradient may lie over the logits
    write_gradient<S, kIsUniform, Group>(stretch, scene.spread, of);
  }
  return loss;
}

template <class S, bool kIsUniform, bool kIsBlock>
__device__ __forceinline__ void do_rows(const CrossEntropyWork& work) {
  using Threads = Group<kIsBlock>;
  FASTOPT_DYNAMIC_SHARED(shared);
  S* const stage = work.is_staged ? reinterpret_cast<S*>(shared) : nullptr;
  const Scene<S> scene = set_scene<S>(work);
  const CrossEntropyProblem& p = work.problem;
  const int groups_per_block = kIsBlock ? 1 : static_cast<int>(blockDim.x) / kWarp;
  const int own_group = kIsBlock ? 0 : static_cast<int>(threadIdx.x) / kWarp;
  const int64_t n_groups = static_cast<int64_t>(gridDim.x) * groups_per_block;
  double losses = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * groups_per_block + own_group; row < p.logits_layout.n_outer;
       row += n_groups) {
    const compute_t<S> loss = do_row<S, kIsUniform, Threads>(work, scene, row, stage);
    if (Threads::rank() == 0) {
      losses += loss;
      if (p.losses) store(static_cast<S*>(p.losses)[row], loss);
    }
  }
  reduce_loss<S>(work, losses, scene.denominator);
}

// Kernels that do with fewer registers, so that more blocks share a multiprocessor.
template <class S, bool kIsUniform>
constexpr bool is_light = kIsUniform && sizeof(S) < 8;

constexpr int kWarpRowsThreads = 256;

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kWarpRowsThreads, is_light<S, kIsUniform> ? 3 : 2)
    cross_entropy_warp_rows(const __grid_constant__ CrossEntropyWork work) {
  do_rows<S, kIsUniform, false>(work);
}

constexpr int kMaxBlockRowsThreads = 512;

template <class S, bool kIsUniform>
__global__ void __launch_bounds__(kMaxBlockRowsThreads, is_light<S, kIsUniform> ? 2 : 1)
    cross_entropy_block_rows(const __grid_constant__ CrossEntropyWork work) {
  do_rows<S, kIsUniform, true>(work);
}

// --- Few wide rows: several blocks to a row, in two launches --------------------------------------------------------

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
  if (fate_of(p, target) != RowFate::kKept) return;
  const Scene<S> scene = set_scene<S>(work);
  const Stretch<S> stretch = stretch_of<S>(p, split.row, split.first, split.n);
  RowPart<T> part{merge<Block>(sum_stretch<S, kIsUniform, Block>(stretch, scene.spread), scene.spread), T(0)};
  if (threadIdx.x != 0) return;
  if (target >= split.first && target < split.first + split.n) {
    part.target_logit = load(stretch.logits[target - split.first]);
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
  const Scene<S> scene = set_scene<S>(work);
  const Stretch<S> stretch = stretch_of<S>(p, split.row, split.first, split.n);
  const RowFate fate = fate_of(p, target);
  T loss = 0;
  if (fate != RowFate::kKept) {
    loss = give_up_row<S, Block>(stretch, fate);
  } else {
    // Each warp adds up the row's parts for itself.
    const auto* parts = static_cast<const RowPart<T>*>(work.parts) + split.row * work.n_splits;
    RowSums<T> sums{std::numeric_limits<T>::lowest()};
    T target_logit = 0;
    for (int i = Warp::rank(); i < work.n_splits; i += kWarp) {
      add(sums, parts[i].sums);
      target_logit += parts[i].target_logit;  // of one part; the others hold 0
    }
    sums = merge<Warp>(sums, scene.spread);
    target_logit = Warp::sum(target_logit);
    const GradientOf<T> of = finish_row<S, kIsUniform, T>(p, scene, sums, target, target_logit, loss);
    if (stretch.grad) write_gradient<S, kIsUniform, Block>(stretch, scene.spread, of);
  }
  const bool is_first = threadIdx.x == 0 && split.index == 0;
  if (is_first && p.losses) store(static_cast<S*>(p.losses)[split.row], loss);
  reduce_loss<S>(work, is_first ? static_cast<double>(loss) : 0, scene.denominator);
}

}  // namespace fastopt::cuda
