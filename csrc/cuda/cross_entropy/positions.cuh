// Cross-entropy with one thread per position: columns of images, and rows of few classes.
#pragma once

#include "cuda/cross_entropy/rows.cuh"

namespace fastopt::cuda {

constexpr int kMaxPositionThreads = 512;

// Logits that a thread has in flight, limited by registers.
template <class S>
constexpr int kClassesInFlight = sizeof(S) < 8 ? 8 : 4;

// Short sums that are added before their sum joins the rest.
constexpr int64_t kSumsTogether = 32;

// Offset of a position's first class.
__device__ __forceinline__ int64_t offset_of(const LogitLayout& layout, int64_t position) {
  if (layout.n_inner == 1) return position * layout.outer_stride;
  return position / layout.n_inner * layout.outer_stride + position % layout.n_inner;
}

// Each of eight terms is rounded three times; in a running sum, up to seven times.
template <class T, int kN>
__device__ __forceinline__ T pairwise_sum(T (&values)[kN]) {
#pragma unroll
  for (int width = kN / 2; width > 0; width /= 2) {
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] += values[k + width];
  }
  return values[0];
}

template <class S, bool kIsIndex>
__device__ __forceinline__ compute_t<S> compute_position(const CrossEntropyProblem& p,
                                                         const CallConstants<S>& constants, int64_t position) {
  using T = compute_t<S>;
  using G = gradient_t<S>;
  constexpr int kInFlight = kClassesInFlight<S>;
  const int64_t n_classes = p.logits_layout.n_classes;
  const int64_t logit_stride = p.logits_layout.class_stride;
  const S* logits = static_cast<const S*>(p.logits) + offset_of(p.logits_layout, position);
  const int64_t probability_stride = p.probabilities_layout.class_stride;
  const S* probabilities =
      p.probabilities ? static_cast<const S*>(p.probabilities) + offset_of(p.probabilities_layout, position) : nullptr;
  const int64_t grad_stride = p.grad_layout.class_stride;
  G* grad = p.grad ? static_cast<G*>(p.grad) + offset_of(p.grad_layout, position) : nullptr;
  const int64_t target = p.target ? p.target[position] : -1;
  const TargetStatus status = status_of(p, target);
  if (status != TargetStatus::kValid) {
    const T value = status == TargetStatus::kIgnored ? T(0) : std::numeric_limits<T>::quiet_NaN();
    if (grad) {
      for (int64_t c = 0; c < n_classes; ++c) store(grad[c * grad_stride], value);
    }
    return value;
  }

  // One thread adds all of a position's terms: short sums in the compute type, sums of them in double.
  RowSums<double> all{std::numeric_limits<T>::lowest()};
  RowSums<double> sums = all;
  for (int64_t first = 0; first < n_classes; first += kInFlight) {
    T values[kInFlight];
    T max = static_cast<T>(sums.max);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t c = first + k;
      values[k] = c < n_classes ? load(logits[c * logit_stride]) : std::numeric_limits<T>::lowest();
      max = values[k] > max ? values[k] : max;
    }
    if (max > sums.max) sums.rebase(max);
    T exps[kInFlight] = {}, qs[kInFlight] = {}, qxs[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t c = first + k;
      if (c >= n_classes) break;
      const T shifted = values[k] - max;
      exps[k] = exp_of<S>(shifted);
      if constexpr (!kIsIndex) {
        qs[k] = constants.smoothed.q(c, probabilities ? load(probabilities[c * probability_stride]) : T(0));
        qxs[k] = qs[k] * shifted;
      }
    }
    sums.exp_sum += pairwise_sum(exps);
    if constexpr (!kIsIndex) {
      sums.q_sum += pairwise_sum(qs);
      sums.qx_sum += pairwise_sum(qxs);
    }
    if (first / kInFlight % kSumsTogether == kSumsTogether - 1) {
      add(all, sums);
      sums = {sums.max};
    }
  }
  add(all, sums);
  const double target_logit = p.target ? static_cast<double>(load(logits[target * logit_stride])) : 0;
  T loss;
  const GradientConstants<T> gradient = finish_row<S, kIsIndex, double>(p, constants, all, target, target_logit, loss);
  if (!grad) return loss;

  for (int64_t first = 0; first < n_classes; first += kInFlight) {
    T values[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t c = first + k;
      values[k] = c < n_classes ? load(logits[c * logit_stride]) : T(0);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t c = first + k;
      if (c >= n_classes) break;
      T value = gradient.factor * exp_of<S>(values[k] - gradient.max);
      if constexpr (!kIsIndex) {
        value -= gradient.scale *
                 constants.smoothed.q(c, probabilities ? load(probabilities[c * probability_stride]) : T(0));
      }
      value -= c == gradient.target ? gradient.scale * gradient.on : T(0);
      store(grad[c * grad_stride], value);
    }
  }
  return loss;
}

template <class S, bool kIsIndex>
__global__ void __launch_bounds__(kMaxPositionThreads, 1)
    cross_entropy_positions(const __grid_constant__ CrossEntropyWork work) {
  const CrossEntropyProblem& p = work.problem;
  const CallConstants<S> constants = load_constants<S>(work);
  const int64_t n = p.logits_layout.n_outer * p.logits_layout.n_inner;
  double losses = 0;
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; position < n;
       position += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const compute_t<S> loss = compute_position<S, kIsIndex>(p, constants, position);
    if (p.losses) store(static_cast<S*>(p.losses)[position], loss);
    losses += loss;
  }
  reduce_loss<S>(work, losses, constants.denominator);
}

}  // namespace fastopt::cuda
