// Cross-entropy of one row by a group of threads: how they divide its classes, their sums, and the gradient.
#pragma once

#include "cuda/library.h"
#include "cuda/pack.h"
#include "cuda/reduce.cuh"
#include "math/exp.h"

namespace fastopt::cuda {

// kIsUniform, of the row kernels: q is the same for every class but the target: 0, or uniform label smoothing.

// Packs that a thread has in flight, limited by registers.
template <class S, bool kIsUniform>
constexpr int kPacksInFlight = kIsUniform && sizeof(S) < 8 ? 4 : 2;

template <class S>
__device__ __forceinline__ compute_t<S> exp_of(compute_t<S> x) {
  if constexpr (sizeof(S) == 2) {
    return exp_nonpositive_coarse(x);
  } else {
    return exp_nonpositive(x);
  }
}

// Adjacent classes of a row. Logits between the first and the last 16-byte boundary are read in packs, the others one
// by one; `first_class` is the class of the first logit. Other arrays are accessed in packs if they have the same
// boundaries.
template <class S>
struct RowSlice {
  using T = compute_t<S>;
  using G = gradient_t<S>;
  static constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(S));
  const S* logits;
  const S* probabilities;  // or null
  G* grad;                 // or null
  S* stage;                // shared memory for the logits, aligned as they are, or null
  int64_t n, first_class;

  __device__ __forceinline__ int64_t n_before_boundary() const {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(logits) % kAccessBytes / sizeof(S);
    const int64_t before = (kVector - misaligned) % kVector;
    return before < n ? before : n;
  }

  // Calls f(first, values, n) for packs of this thread, first an index into the slice, values an array
  // [packs][elements] of which the first n count. All threads divide the same slice in the same way each time, also
  // when `from` is the stage.
  template <class Group, int kPacks, class F>
  __device__ __forceinline__ void for_each(const S* from, F&& f) const {
    const int rank = Group::rank(), size = Group::size();
    const int64_t before = n_before_boundary();
    const int64_t n_packs = (n - before) / kVector;
    const int64_t after = before + n_packs * kVector;
    const auto single = [&](int64_t i) {
      const S value[1][1] = {{from[i]}};
      f(&i, value, 1);
    };
    if (rank < before) single(rank);
    const S* body = from + before;
    const auto round = [&](int64_t pack, int n_there) {
      S values[kPacks][kVector];
      int64_t first[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        // A pack beyond the last is replaced by the first, so that all loads are unconditional and start together.
        const int64_t offset = (pack + (p < n_there ? p : 0) * size) * kVector;
        first[p] = before + offset;
        const auto loaded = Pack<S, kVector>::load(body + offset);
        memcpy(values[p], loaded.values, sizeof(loaded.values));
      }
      f(first, values, n_there);
    };
    int64_t pack = rank;
    for (; pack + (kPacks - 1) * size < n_packs; pack += kPacks * size) round(pack, kPacks);
    if (pack < n_packs) round(pack, static_cast<int>((n_packs - pack + size - 1) / size));
    if (after + rank < n) single(after + rank);
  }
};

// Computes q_c, without the term that an index target adds; the kind is known at run time only.
template <class T>
struct SmoothedTarget {
  TargetKind kind;
  TargetTerms<T> terms;

  __device__ __forceinline__ T q(int64_t c, T probability) const {
    switch (kind) {
      case TargetKind::kIndexUniform: return smoothed_q<T, TargetKind::kIndexUniform>(terms, c, probability);
      case TargetKind::kIndexWeighted: return smoothed_q<T, TargetKind::kIndexWeighted>(terms, c, probability);
      case TargetKind::kProbability: return smoothed_q<T, TargetKind::kProbability>(terms, c, probability);
      default: return smoothed_q<T, TargetKind::kProbabilityWeighted>(terms, c, probability);
    }
  }
};

// Loads the values that belong to a pack of logits, in one access if they have the same boundaries.
template <class S, int kN>
__device__ __forceinline__ void load_like(const S* from, bool has_same_boundaries, S (&values)[kN]) {
  if constexpr (kN * sizeof(S) % kAccessBytes == 0) {
    if (has_same_boundaries) {
      const auto pack = Pack<S, kN>::load(from);
      memcpy(values, pack.values, sizeof(values));
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) values[k] = from[k];
}

template <class S, int kN>
__device__ __forceinline__ void store_like(S* to, bool has_same_boundaries, const S (&values)[kN]) {
  if constexpr (kN * sizeof(S) % kAccessBytes == 0) {
    if (has_same_boundaries) {
      Pack<S, kN> pack;
      memcpy(pack.values, values, sizeof(values));
      pack.store(to);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) to[k] = values[k];
}

// This thread's partial sums over a slice.
template <class S, bool kIsUniform, class Group>
__device__ __forceinline__ RowSums<compute_t<S>> sum_slice(const RowSlice<S>& slice,
                                                           const SmoothedTarget<compute_t<S>>& smoothed) {
  using T = compute_t<S>;
  RowSums<T> sums{std::numeric_limits<T>::lowest()};
  const bool has_same_boundaries =
      !kIsUniform && slice.probabilities && is_aligned(slice.probabilities + slice.n_before_boundary());
  slice.template for_each<Group, kPacksInFlight<S, kIsUniform>>(
      slice.logits, [&](const int64_t* first, const auto& values, int n_packs) {
        constexpr int kPacks = sizeof(values) / sizeof(values[0]);
        constexpr int kN = sizeof(values[0]) / sizeof(S);
        T max = load(values[0][0]);
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (slice.stage && p < n_packs) store_like(slice.stage + first[p], true, values[p]);
#pragma unroll
          for (int k = 0; k < kN; ++k) {
            const T x = load(values[p][k]);
            max = x > max ? x : max;
          }
        }
        if (max > sums.max) sums.rebase(max);
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p >= n_packs) break;
          [[maybe_unused]] S probabilities[kN];
          if constexpr (!kIsUniform) {
            if (slice.probabilities) load_like(slice.probabilities + first[p], has_same_boundaries, probabilities);
          }
#pragma unroll
          for (int k = 0; k < kN; ++k) {
            const T shifted = load(values[p][k]) - sums.max;
            sums.exp_sum += exp_of<S>(shifted);
            if constexpr (kIsUniform) {
              sums.qx_sum += smoothed.terms.off * shifted;  // not multiplied later: a sum of masked logits may overflow
            } else {
              const T probability = slice.probabilities ? load(probabilities[k]) : T(0);
              const T q = smoothed.q(slice.first_class + first[p] + k, probability);
              sums.q_sum += q;
              sums.qx_sum += q * shifted;
            }
          }
          if constexpr (kIsUniform) sums.q_sum += smoothed.terms.off * T(kN);
        }
      });
  return sums;
}

// Adds sums that may be relative to another maximum.
template <class A>
__device__ __forceinline__ void add(RowSums<A>& to, RowSums<A> from) {
  const A max = from.max > to.max ? from.max : to.max;
  from.rebase(max);
  to.rebase(max);
  to.exp_sum += from.exp_sum;
  to.q_sum += from.q_sum;
  to.qx_sum += from.qx_sum;
}

// The group's sums, from the sums of its threads.
template <class Group, class T>
__device__ __forceinline__ RowSums<T> merge(RowSums<T> sums, const SmoothedTarget<T>& smoothed) {
  sums.rebase(Group::max(sums.max));
  sums.exp_sum = Group::sum(sums.exp_sum);
  if (smoothed.kind != TargetKind::kIndex) {
    sums.q_sum = Group::sum(sums.q_sum);
    sums.qx_sum = Group::sum(sums.qx_sum);
  }
  return sums;
}

// Constants of a row's gradient, factor exp(x - max) - scale q. `uniform` is scale q if that is the same for all
// classes.
template <class T>
struct GradientConstants {
  T max, factor, scale, on, uniform;
  int64_t target;  // -1: none
};

template <class S, bool kIsUniform, class Group>
__device__ __forceinline__ void write_gradient(const RowSlice<S>& slice, const SmoothedTarget<compute_t<S>>& smoothed,
                                               const GradientConstants<compute_t<S>>& gradient) {
  using T = compute_t<S>;
  using G = gradient_t<S>;
  const int64_t before = slice.n_before_boundary();
  const bool aligned_grad = is_aligned(slice.grad + before);
  const bool aligned_probabilities = !kIsUniform && slice.probabilities && is_aligned(slice.probabilities + before);
  const T on = gradient.scale * gradient.on;
  const auto write = [&](const int64_t* first, const auto& values, int n_packs) {
    constexpr int kPacks = sizeof(values) / sizeof(values[0]);
    constexpr int kN = sizeof(values[0]) / sizeof(S);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p >= n_packs) break;
      [[maybe_unused]] S probabilities[kN];
      if constexpr (!kIsUniform) {
        if (slice.probabilities) load_like(slice.probabilities + first[p], aligned_probabilities, probabilities);
      }
      const int64_t to_target = gradient.target - slice.first_class - first[p];
      const int target = to_target >= 0 && to_target < kN ? static_cast<int>(to_target) : -1;
      G grads[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        T value = gradient.factor * exp_of<S>(load(values[p][k]) - gradient.max) - gradient.uniform;
        if constexpr (!kIsUniform) {
          const T probability = slice.probabilities ? load(probabilities[k]) : T(0);
          value -= gradient.scale * smoothed.q(slice.first_class + first[p] + k, probability);
        }
        value -= k == target ? on : T(0);
        store(grads[k], value);
      }
      store_like(slice.grad + first[p], aligned_grad, grads);
    }
  };
  slice.template for_each<Group, kPacksInFlight<S, kIsUniform>>(slice.stage ? slice.stage : slice.logits, write);
}

// Fills the gradient of a row whose target is ignored (0) or invalid (NaN).
template <class S, class Group>
__device__ __forceinline__ void fill_gradient(const RowSlice<S>& slice, compute_t<S> value) {
  using G = gradient_t<S>;
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(G));
  const int64_t misaligned = reinterpret_cast<uintptr_t>(slice.grad) % kAccessBytes / sizeof(G);
  const int64_t to_boundary = (kVector - misaligned) % kVector;
  const int64_t before = to_boundary < slice.n ? to_boundary : slice.n;
  const int64_t after = slice.n - (slice.n - before) % kVector;
  Pack<G, kVector> pack;
#pragma unroll
  for (int k = 0; k < kVector; ++k) store(pack.values[k], value);
  const int rank = Group::rank();
  if (rank < before) slice.grad[rank] = pack.values[0];
  for (int64_t i = before + static_cast<int64_t>(rank) * kVector; i < after; i += Group::size() * kVector) {
    pack.store(slice.grad + i);
  }
  if (after + rank < slice.n) slice.grad[after + rank] = pack.values[0];
}

}  // namespace fastopt::cuda
