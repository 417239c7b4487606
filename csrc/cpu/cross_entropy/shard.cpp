#include "cpu/cross_entropy/shard.h"

#include <algorithm>    // max, min
#include <limits>       // numeric_limits
#include <type_traits>  // conditional_t, integral_constant

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/row_gradient.h"
#include "cpu/cross_entropy/row_sums.h"
#include "cpu/streaming.h"

namespace fastopt::cpu {
namespace {

template <class S, TargetKind kTarget>
FASTOPT_CLONES RowSums<double> sum_row(const S* logits, int64_t n_classes, const TargetTerms<compute_t<S>> terms) {
  using T = compute_t<S>;
  alignas(64) T x_buffer[kMaxRowBlock];
  RowLaneSums<T, kTarget> sums;
  for (int64_t first = 0, n; first < n_classes; first += n) {
    n = block_size(first, n_classes);
    const T* x;
    const T max = widen_and_find_max(logits + first, n, x_buffer, x);
    if (first == 0) {
      sums.max = max;
    } else if (max > sums.max) {
      sums.rebase(max, static_cast<double>(terms.off) * first);
    }
    // The row's target is not known yet, so it may have the maximum.
    add_block<S, kTarget, false>(logits + first, x, nullptr, terms, first, n, nullptr, sums, /*may_be_target=*/true,
                                 [](int64_t, int64_t) __attribute__((always_inline)) {});
  }
  return sums.total();
}

// Calls f with an empty value of the stored type, and the kind of target.
template <class F>
void with_kind(const LogitShard& shard, F&& f) {
  using Kind = TargetKind;
  with_stored_type(shard.dtype, [&](auto stored) {
    if (!shard.is_smoothed) return f(stored, std::integral_constant<Kind, Kind::kIndex>{});
    if (!shard.weight) return f(stored, std::integral_constant<Kind, Kind::kIndexUniform>{});
    f(stored, std::integral_constant<Kind, Kind::kIndexWeighted>{});
  });
}

// Calls f(i) for each row, and done() on each thread after its last.
template <class F, class D>
void for_rows(const LogitShard& shard, const Threads& threads, F&& f, D&& done) {
  const int64_t n_task_rows = std::max<int64_t>(kLogitsPerTask / shard.n_classes, 1);
  const int64_t n_tasks = divide_up(shard.n_rows, n_task_rows);
  share_tasks(at_most(threads, shard.n_rows * shard.n_classes), n_tasks, [&](auto&& next) {
    for (int64_t task = next(); task < n_tasks; task = next()) {
      const int64_t end = std::min((task + 1) * n_task_rows, shard.n_rows);
      for (int64_t i = task * n_task_rows; i < end; ++i) f(i);
    }
    done();
  });
}

}  // namespace

void shard_totals(const LogitShard& shard, const Threads& threads, const ShardTotals& totals) {
  with_kind(shard, [&](auto stored, auto kind) {
    using S = decltype(stored);
    using T = compute_t<S>;
    const TargetTerms<T> terms{0, 0, T(1), T(0), static_cast<const T*>(shard.weight)};
    const auto sum = [&](int64_t i) {
      RowSums<double> sums{std::numeric_limits<T>::lowest()};
      if (shard.is_kept[i]) {
        const S* logits = static_cast<const S*>(shard.logits) + i * shard.row_stride;
        sums = sum_row<S, decltype(kind)::value>(logits, shard.n_classes, terms);
      }
      totals.max[i] = sums.max;
      totals.exp_sum[i] = sums.exp_sum;
      if (shard.is_smoothed) totals.logit_sum[i] = sums.qx_sum;
    };
    for_rows(shard, threads, sum, [] {});
  });
}

void shard_gradient(const LogitShard& shard, const Threads& threads, const ShardGradient& gradient) {
  with_kind(shard, [&](auto stored, auto kind) {
    using Stored = decltype(stored);
    using S = std::conditional_t<std::is_same_v<Stored, Half>, FinalHalf, Stored>;
    using T = compute_t<S>;
    const bool streams = kCanStream && exceeds_caches(2 * shard.n_rows * shard.n_classes * sizeof(S));
    const auto write = [&](int64_t i) {
      Row<S> row{};
      row.n_classes = shard.n_classes;
      row.logits = static_cast<const S*>(shard.logits) + i * shard.row_stride;
      row.grad = static_cast<gradient_t<S>*>(gradient.grad) + i * gradient.row_stride;
      if (!shard.is_kept[i]) {
        memset(static_cast<void*>(row.grad), 0, row.n_classes * sizeof(*row.grad));
        return;
      }
      copy_targets(gradient.target + i, 1, &row.target);
      if (!is_class(row.target, row.n_classes)) row.target = kTargetNotInRow;
      const TargetTerms<T> terms{gradient.on[i], gradient.smoothed_sum[i], T(gradient.off), T(0),
                                 static_cast<const T*>(shard.weight)};
      const RowTotals totals{gradient.max[i], gradient.exp_sum[i], terms.smoothed_sum};
      row_gradient<S, decltype(kind)::value>(row, terms, gradient.scale[i], totals, streams);
    };
    for_rows(shard, threads, write, [&] {
      if (streams) end_streaming();
    });
  });
}

}  // namespace fastopt::cpu
