// Cross-entropy of one row of logits x against a distribution q over classes: the arithmetic shared by all devices.
//
//   loss = sum_c q_c (lse - x_c),  lse = log sum_c exp(x_c),  gradient_c = Q exp(x_c - lse) - q_c,  Q = sum_c q_c
//
// Class index t, smoothing s, class weights w:  q_c = (1 - s) w_t [c = t] + (s / C) w_c
// Class probabilities y:                        q_c = w_c ((1 - s) y_c + s / C)
#pragma once

#include <cmath>   // exp, log
#include <limits>  // numeric_limits

#include "common.h"

namespace fastopt {

// Where q comes from: an index target alone, with uniform or weighted label smoothing, or (weighted) probabilities.
enum class TargetKind : int8_t { kIndex, kIndexUniform, kIndexWeighted, kProbability, kProbabilityWeighted };

constexpr bool has_index(TargetKind kind) { return kind <= TargetKind::kIndexWeighted; }

// Positions are (outer, inner); a logit's offset is outer * outer_stride + class * class_stride + inner * inner_stride.
// Either class_stride is 1 (rows; n_inner is 1) or inner_stride is 1 (columns).
struct LogitLayout {
  int64_t n_outer, n_classes, n_inner;
  int64_t outer_stride, class_stride;
  FASTOPT_HD bool is_rows() const { return n_inner == 1 && class_stride == 1; }
};

// Float16 logits whose gradient is stored in float16 at once: nothing multiplies it later.
struct FinalHalf : Half {};

// Float16 cannot hold a gradient before it is multiplied by a loss scaler's factor, so until then it is kept in float.
template <class S>
struct GradientType {
  using type = S;
};
template <>
struct GradientType<Half> {
  using type = float;
};
template <>
struct GradientType<FinalHalf> {
  using type = Half;
};
template <class S>
using gradient_t = typename GradientType<S>::type;

// The numbers that a row's gradient needs of all its logits.
struct RowTotals {
  double max;
  double exp_sum;  // sum exp(x - max)
  double q_sum;    // sum q
};

FASTOPT_HD bool is_class(int64_t target, int64_t n_classes) {
  return static_cast<uint64_t>(target) < static_cast<uint64_t>(n_classes);
}

// True if the target is neither a class nor ignored. Branch-free, so that counting vectorises.
FASTOPT_HD bool is_bad_target(int64_t target, int64_t n_classes, int64_t ignore_index) {
  return (target != ignore_index) & !is_class(target, n_classes);
}

struct CrossEntropyProblem {
  DType dtype;  // of logits, probabilities and losses
  const void* logits;
  LogitLayout logits_layout;
  const int64_t* target;      // class of each position, or null
  const void* probabilities;  // laid out as probabilities_layout, or null
  LogitLayout probabilities_layout;
  const void* weight;  // of each class, in the compute type, or null
  int64_t ignore_index;
  double label_smoothing;
  double weight_sum;   // of all classes; n_classes if weight is null or nothing is smoothed
  void* grad;          // d loss / d logits times grad_scale, or null; float for float16 logits, else dtype
  bool is_grad_final;  // of float16 logits, on the CPU: the gradient is float16, too
  LogitLayout grad_layout;
  double grad_scale;
  void* losses;       // of each position, or null
  RowTotals* totals;  // of each position: written if no gradient is wanted, read if one is; or null

  FASTOPT_HD TargetKind kind() const {
    if (probabilities) return weight ? TargetKind::kProbabilityWeighted : TargetKind::kProbability;
    if (label_smoothing == 0) return TargetKind::kIndex;
    return weight ? TargetKind::kIndexWeighted : TargetKind::kIndexUniform;
  }
};

// q of one row, in the compute type.
template <class T>
struct TargetTerms {
  double on;            // q added at the target: (1 - s) w_t
  double smoothed_sum;  // sum of smoothed q: s / C sum w; not known beforehand for probabilities
  T off;                // s / C
  T keep;               // 1 - s
  const T* weight;      // of each class, or null
};

// q of class c, without the term that an index target adds at t. Terms are passed by value: through a reference the
// loops would not vectorise.
template <class T, TargetKind kTarget>
FASTOPT_HD T smoothed_q(TargetTerms<T> terms, int64_t c, T probability) {
  if constexpr (kTarget == TargetKind::kIndexUniform) return terms.off;
  if constexpr (kTarget == TargetKind::kIndexWeighted) return terms.off * terms.weight[c];
  const T q = terms.keep * probability + terms.off;
  return kTarget == TargetKind::kProbabilityWeighted ? terms.weight[c] * q : q;
}

// The gradient of class c, from e = exp(x - max), without the term that an index target adds at t.
template <class T, TargetKind kTarget>
FASTOPT_HD T class_gradient(T e, T factor, T scale, TargetTerms<T> terms, int64_t c, T probability) {
  if constexpr (kTarget == TargetKind::kIndex) return factor * e;
  return factor * e - scale * smoothed_q<T, kTarget>(terms, c, probability);
}

// The gradient of an index target's class t.
template <class T, TargetKind kTarget>
FASTOPT_HD double target_gradient(T e, double factor, double scale, TargetTerms<T> terms, double on, int64_t t) {
  const double value = factor * e - scale * on;
  if constexpr (kTarget == TargetKind::kIndex) return value;
  return value - scale * smoothed_q<T, kTarget>(terms, t, T(0));
}

// The running maximum and the sums relative to it. The CPU keeps sums in double and adds blocks of them; a GPU's many
// threads keep short sums in the compute type.
template <class A>
struct RowSums {
  // The lowest finite number, not -inf: a row may start with logits of -inf, and -inf - -inf is not a number.
  A max;
  A exp_sum = 0;  // sum exp(x - max)
  A q_sum = 0;    // sum q
  A qx_sum = 0;   // sum q (x - max)

  FASTOPT_HD void rebase(A new_max) {
    exp_sum *= std::exp(max - new_max);
    if (q_sum != 0) qx_sum += q_sum * (max - new_max);  // not 0 times the infinity that leaving the lowest number gives
    max = new_max;
  }
};

// The loss of a row: `on` at the target, and the q in the sums. log_sum = log(sums.exp_sum).
template <class A>
FASTOPT_HD A row_loss(const RowSums<A>& sums, A log_sum, A on, A target_logit, bool has_target, bool has_q_sums) {
  A loss = 0;
  // Differences of logits first: a shift common to all logits must not change the loss.
  if (has_target) loss += on * (log_sum - (target_logit - sums.max));
  if (has_q_sums) loss += sums.q_sum * log_sum - sums.qx_sum;
  return loss;
}

}  // namespace fastopt
