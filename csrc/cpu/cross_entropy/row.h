// Cross-entropy of wide rows (contiguous classes), block by block: each logit is read from memory once.
// Where loss and gradient are computed separately, the gradient reads it once more and reuses the loss's sums.
#pragma once

#include <algorithm>  // min
#include <limits>     // numeric_limits

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/line_writer.h"
#include "losses/cross_entropy.h"
#include "math/exp.h"

namespace fastopt::cpu {

// A row has at least kLanes classes. Logits of a block and their exponentials stay in the first-level cache. The last
// block has up to kLanes more, so that none has fewer than kLanes.
constexpr int64_t kRowBlock = 2048, kMaxRowBlock = kRowBlock + kLanes;
// Prefetch distance, in logits: the block after next.
constexpr int64_t kPrefetchDistance = 2 * kRowBlock;
// Row::target where the target's class is in another process's shard.
constexpr int64_t kTargetNotInRow = -1;

template <class S>
struct Row {
  using T = compute_t<S>;
  const S* logits;
  const S* probabilities;
  gradient_t<S>* grad;  // may point to the logits
  T* exps;              // n_classes; may point to grad if no gradient is pending
  double* offsets;      // one for each block: the maximum its exponentials are relative to
  int64_t n_classes;
  int64_t target;
};

// Sums over the classes, relative to max.
template <class T, TargetKind kTarget>
struct RowLaneSums {
  static constexpr bool kSumsQx = kTarget != TargetKind::kIndex;
  // The sum of uniform smoothing's q is known from the number of classes.
  static constexpr bool kSumsQ = kSumsQx && kTarget != TargetKind::kIndexUniform;
  T max = 0;  // of the first block, before anything is summed
  LaneSums<T> exp;
  LaneSumsIf<kSumsQ, T> q;
  LaneSumsIf<kSumsQx, T> qx;

  FASTOPT_HD void flush() {
    exp.flush();
    q.flush();
    qx.flush();
  }
  FASTOPT_HD RowSums<double> total() const { return {static_cast<double>(max), exp.total(), q.total(), qx.total()}; }
  // uniform_q: the sum of q so far, where smoothing is uniform.
  FASTOPT_HD void rebase(T new_max, double uniform_q) {
    const double shift = static_cast<double>(max) - static_cast<double>(new_max);
    const double factor = std::exp(shift);
    for (int64_t l = 0; l < kLanes; ++l) exp.full[l] *= factor;
    // The shift is infinite where both maxima are huge: then 0 times it would not be a number.
    if constexpr (kSumsQ) {
      for (int64_t l = 0; l < kLanes; ++l) qx.full[l] += q.full[l] != 0 ? q.full[l] * shift : 0;
    } else if constexpr (kSumsQx) {
      if (uniform_q != 0) qx.full[0] += uniform_q * shift;
    }
    max = new_max;
  }
};

// Classes of the block that starts at `first`.
FASTOPT_HD int64_t block_size(int64_t first, int64_t n_classes) {
  const int64_t n = n_classes - first;
  return n <= kMaxRowBlock ? n : kRowBlock;
}

// Calls f(i) for groups of kLanes classes from i on; the last group overlaps the one before it if n is no multiple.
template <class F>
FASTOPT_HD void for_whole_groups(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(n - kLanes);
}

// A block in the compute type: the block itself, or its copy converted into the buffer.
template <class S>
FASTOPT_HD const compute_t<S>* widened(const S* from, int64_t n, compute_t<S>* buffer) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return from;
  } else {
    for_whole_groups(n, [&](int64_t i) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) buffer[i + l] = load(from[i + l]);
    });
    return buffer;
  }
}

// The same, and the block's maximum: at least the lowest finite number, for -inf - -inf is not a number.
template <class S>
FASTOPT_HD compute_t<S> widen_and_find_max(const S* from, int64_t n, compute_t<S>* buffer, const compute_t<S>*& x) {
  using T = compute_t<S>;
  alignas(64) T running[kLanes];  // which stays in registers
  for (int64_t l = 0; l < kLanes; ++l) running[l] = std::numeric_limits<T>::lowest();
  for_whole_groups(n, [&](int64_t i) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const T value = load(from[i + l]);
      if constexpr (!std::is_same_v<S, T>) buffer[i + l] = value;
      running[l] = value > running[l] ? value : running[l];
    }
  });
  if constexpr (std::is_same_v<S, T>) {
    x = from;
  } else {
    x = buffer;
  }
  return fold_lanes(running, [](T a, T b) { return b > a ? b : a; });
}

// Calls f(i, m) for each group of m <= kLanes classes in [begin, end) of a block, and prefetches logits that will be
// read later.
template <class S, class F>
FASTOPT_HD void for_groups(const S* logits, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t kLineElements = kLineBytes / sizeof(S);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int64_t l = 0; l < kLanes; l += kLineElements) __builtin_prefetch(logits + kPrefetchDistance + i + l);
    f(i, kLanes);
  }
  if (i < end) f(i, end - i);
}

// Adds the exponentials and q of kLanes classes to the sums, relative to sums.max; keeps the exponentials if a gradient
// is wanted. `first` counts the classes before them. The first n_again classes, which the group before had, are
// skipped.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_classes(const T* x, const T* y, const TargetTerms<T> terms, int64_t first, int64_t n_again, T* exps,
                            RowLaneSums<T, kTarget>& sums) {
  const T max = sums.max;
  const int32_t n_skipped = static_cast<int32_t>(n_again);
#pragma omp simd
  for (int32_t l = 0; l < kLanes; ++l) {
    const bool is_new = l >= n_skipped;
    const T shifted = x[l] - max;
    const T e = exp_nonpositive(shifted);
    sums.exp.partial[l] += is_new ? e : T(0);
    if constexpr (kWantsGrad) exps[l] = is_new ? e : exps[l];
    if constexpr (kTarget != TargetKind::kIndex) {
      const T q = smoothed_q<T, kTarget>(terms, first + l, has_index(kTarget) ? T(0) : y[l]);
      if constexpr (RowLaneSums<T, kTarget>::kSumsQ) sums.q.partial[l] += is_new ? q : T(0);
      sums.qx.partial[l] += is_new ? q * shifted : T(0);
    }
  }
}

// If a single lane holds the maximum, whose exponential is 1: adds that lane's exponentials in double. Added to the 1
// they would be rounded to its units, and the loss of a nearly certain row is their sum. The classes are [begin, end)
// of a block whose logits are x; exps holds their exponentials if a gradient is wanted. From `last` on, a class's lane
// is counted from end - kLanes.
template <class T, TargetKind kTarget, bool kWantsGrad>
FASTOPT_HD void add_lane_of_max(const T* x, int64_t begin, int64_t last, int64_t end, const T* exps,
                                RowLaneSums<T, kTarget>& sums) {
  int32_t n_lanes = 0, lane = 0;
  for (int32_t l = 0; l < kLanes; ++l) {
    const bool is_large = sums.exp.partial[l] >= 1;
    n_lanes += is_large ? 1 : 0;
    lane += is_large ? l : 0;
  }
  if (n_lanes != 1) return;
  const auto exp_of = [&](int64_t i) { return kWantsGrad ? exps[i] : exp_nonpositive(x[i] - sums.max); };
  double sum = 0;
  for (int64_t i = begin + lane; i < last; i += kLanes) sum += exp_of(i);
  if (end - kLanes + lane >= last) sum += exp_of(end - kLanes + lane);
  sums.exp.partial[lane] = 0;
  sums.exp.full[lane] += sum;
}

// add_classes of a block, whose logits are x in the compute type. Calls before(i, m) for each group of m classes from
// i. Where the target may have the maximum, the others' sum is kept exact; the loss of another target is log 2 or more.
template <class S, TargetKind kTarget, bool kWantsGrad, class F>
FASTOPT_HD void add_block(const S* logits, const compute_t<S>* x, const compute_t<S>* y,
                          const TargetTerms<compute_t<S>> terms, int64_t first, int64_t n, compute_t<S>* exps,
                          RowLaneSums<compute_t<S>, kTarget>& sums, bool may_be_target, F&& before) {
  using T = compute_t<S>;
  const auto add = [&](int64_t i, int64_t n_again) __attribute__((always_inline)) {
    add_classes<T, kTarget, kWantsGrad>(x + i, y + (has_index(kTarget) ? 0 : i), terms, first + i, n_again,
                                        exps + (kWantsGrad ? i : 0), sums);
  };
  for (int64_t part = 0; part < n; part += kSumTerms * kLanes) {
    const int64_t end = std::min(part + kSumTerms * kLanes, n), last = end - (end - part) % kLanes;
    for_groups(logits, part, last, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      before(i, m);
      add(i, 0);
    });
    if (last < end) {
      before(last, end - last);
      add(end - kLanes, last - (end - kLanes));
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (may_be_target) add_lane_of_max<T, kTarget, kWantsGrad>(x, part, last, end, exps, sums);
    }
    sums.flush();
  }
}

// The gradient of a row whose exponentials are summed. It is written at once or, if it streams, while the next row's
// exponentials overwrite this one's: arithmetic, reading and writing then overlap.
template <class S, TargetKind kTarget>
class RowGradient {
  using T = compute_t<S>;
  static constexpr bool kHasTarget = has_index(kTarget);

 public:
  FASTOPT_HD bool is_pending() const { return is_pending_; }
  FASTOPT_HD void begin(const Row<S>& row, const TargetTerms<T>& terms, const RowTotals& totals, double grad_scale,
                        bool streams) {
    is_pending_ = true;
    row_ = row;
    terms_ = terms;
    max_ = totals.max;
    scale_ = grad_scale;
    factor_ = grad_scale * (totals.q_sum + (kHasTarget ? terms.on : 0)) / totals.exp_sum;
    if constexpr (kHasTarget) target_exp_ = row.exps[row.target];
    lines_.begin(row.grad, streams);
  }
  FASTOPT_HD void begin_block(int64_t first) {
    const double offset = row_.offsets[first / kRowBlock];
    block_factor_ = offset == max_ ? factor_ : factor_ * std::exp(offset - max_);
  }
  // Classes that may be written at once.
  FASTOPT_HD int64_t max_group() const { return lines_.streams() ? kLanes : kMaxRowBlock; }
  // Writes n classes; `first` counts those before them.
  FASTOPT_HD void write_classes(int64_t first, int64_t n) {
    const TargetTerms<T> terms = terms_;
    const T factor = static_cast<T>(block_factor_), scale = static_cast<T>(scale_);
    const T* exps = row_.exps + first;
    const S* y = row_.probabilities + (kHasTarget ? 0 : first);
    gradient_t<S>* grad = lines_.space(first);
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) {
      T probability = 0;
      if constexpr (!kHasTarget) probability = load(y[l]);
      store(grad[l], class_gradient<T, kTarget>(exps[l], factor, scale, terms, first + l, probability));
    }
    if constexpr (kHasTarget) {
      const int64_t t = row_.target - first;
      if (t >= 0 && t < n) {
        const double value =
            target_gradient<T, kTarget>(target_exp_, block_factor_, scale_, terms, terms.on, first + t);
        store(grad[t], static_cast<T>(value));
      }
    }
    lines_.write(first, n);
  }
  FASTOPT_HD void end() {
    lines_.end(row_.n_classes);
    is_pending_ = false;
  }
  FASTOPT_HD const Row<S>& row() const { return row_; }

 private:
  bool is_pending_ = false;
  Row<S> row_;
  TargetTerms<T> terms_;
  double max_, scale_, factor_, block_factor_;
  T target_exp_;
  LineWriter<gradient_t<S>, kLanes> lines_;
};

// Returns the loss of a row, and meanwhile writes the pending row's gradient.
template <class S, TargetKind kTarget, bool kWantsGrad>
FASTOPT_CLONES double read_row(const Row<S>& row, const TargetTerms<compute_t<S>>& terms, RowTotals& totals,
                               RowGradient<S, kTarget>& pending) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  // Read before exponentials may take the logits' place.
  const double target_logit = kHasTarget ? static_cast<double>(load(row.logits[row.target])) : 0.0;
  alignas(64) T x_buffer[kMaxRowBlock];
  [[maybe_unused]] alignas(64) T y_buffer[kMaxRowBlock];
  const bool writes = kWantsGrad && pending.is_pending();
  RowLaneSums<T, kTarget> lane_sums;
  for (int64_t first = 0, n; first < row.n_classes; first += n) {
    n = block_size(first, row.n_classes);
    const T* x;
    const T max = widen_and_find_max(row.logits + first, n, x_buffer, x);
    const T* y = nullptr;
    if constexpr (!kHasTarget) y = widened(row.probabilities + first, n, y_buffer);
    if (first == 0) {
      lane_sums.max = max;
    } else if (max > lane_sums.max) {
      lane_sums.rebase(max, static_cast<double>(terms.off) * first);
    }
    if (writes) pending.begin_block(first);
    if constexpr (kWantsGrad) row.offsets[first / kRowBlock] = lane_sums.max;
    add_block<S, kTarget, kWantsGrad>(
        row.logits + first, x, y, terms, first, n, kWantsGrad ? row.exps + first : nullptr, lane_sums,
        !kHasTarget || target_logit >= lane_sums.max, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          if (writes) pending.write_classes(first + i, m);
        });
  }
  if (writes) pending.end();
  RowSums<double> sums = lane_sums.total();
  if constexpr (kHasTarget) sums.q_sum = terms.smoothed_sum;
  totals = {sums.max, sums.exp_sum, sums.q_sum};
  return row_loss(sums, std::log(sums.exp_sum), terms.on, target_logit, kHasTarget, kTarget != TargetKind::kIndex);
}

// Writes the pending row's gradient if no row follows.
template <class S, TargetKind kTarget>
FASTOPT_CLONES void write_row(RowGradient<S, kTarget>& pending) {
  const int64_t n_classes = pending.row().n_classes, group = pending.max_group();
  for (int64_t first = 0, end; first < n_classes; first = end) {
    pending.begin_block(first);
    end = first + block_size(first, n_classes);
    for (int64_t i = first; i < end; i += group) pending.write_classes(i, std::min(group, end - i));
  }
  pending.end();
}

// Writes the gradient of a row whose totals are known; it may overwrite the logits.
template <class S, TargetKind kTarget>
FASTOPT_CLONES void row_gradient(const Row<S>& row, const TargetTerms<compute_t<S>> terms, double grad_scale,
                                 const RowTotals& totals, bool streams) {
  using T = compute_t<S>;
  constexpr bool kHasTarget = has_index(kTarget);
  const double exact_factor = grad_scale * (totals.q_sum + (kHasTarget ? terms.on : 0)) / totals.exp_sum;
  const T factor = static_cast<T>(exact_factor), scale = static_cast<T>(grad_scale), max = static_cast<T>(totals.max);
  T target_value = 0;
  if (kHasTarget && row.target != kTargetNotInRow) {
    const T e = exp_nonpositive(load(row.logits[row.target]) - max);
    target_value =
        static_cast<T>(target_gradient<T, kTarget>(e, exact_factor, grad_scale, terms, terms.on, row.target));
  }
  alignas(64) T x_buffer[kMaxRowBlock];
  LineWriter<gradient_t<S>, kLanes> lines;
  lines.begin(row.grad, streams);
  for (int64_t first = 0, n; first < row.n_classes; first += n) {
    n = block_size(first, row.n_classes);
    const T* x = widened(row.logits + first, n, x_buffer);
    const S* y = row.probabilities + (kHasTarget ? 0 : first);
    for_groups(row.logits + first, 0, n, [&](int64_t begin, int64_t m) __attribute__((always_inline)) {
      gradient_t<S>* grad = lines.space(first + begin);
#pragma omp simd
      for (int64_t l = 0; l < m; ++l) {
        T probability = 0;
        if constexpr (!kHasTarget) probability = load(y[begin + l]);
        const T e = exp_nonpositive(x[begin + l] - max);
        store(grad[l], class_gradient<T, kTarget>(e, factor, scale, terms, first + begin + l, probability));
      }
      if constexpr (kHasTarget) {
        const int64_t t = row.target - first - begin;
        if (t >= 0 && t < m) store(grad[t], target_value);
      }
      lines.write(first + begin, m);
    });
  }
  lines.end(row.n_classes);
}

}  // namespace fastopt::cpu
