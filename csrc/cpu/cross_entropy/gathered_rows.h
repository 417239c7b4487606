// Columns of many classes, a few positions at a time, copied into rows: a tile of so many classes would not stay in the
// caches, or would have few positions for its lanes.
#pragma once

#include <algorithm>    // min
#include <type_traits>  // is_same_v

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/row.h"
#include "cpu/cross_entropy/rows.h"
#include "cpu/cross_entropy/tile_copies.h"
#include "cpu/scratch.h"

namespace fastopt::cpu {

constexpr int64_t kMaxGathered = 16;      // positions: a line of float
constexpr int64_t kGatheredClasses = 64;  // that are copied at once

// rows[j * row_stride + c] = from[offset of position j + c * class_stride] for all classes c and the positions j of a
// range, which lies in one image.
template <class S>
FASTOPT_CLONES void gather_rows(const S* from, const PositionRange& range, compute_t<S>* rows, int64_t row_stride) {
  using T = compute_t<S>;
  const int64_t stride = range.layout.class_stride, n_classes = range.layout.n_classes;
  from += range.offset(0);
  for (int64_t c = 0; c < n_classes; c += kGatheredClasses) {
    const int64_t n = std::min(kGatheredClasses, n_classes - c);
    if constexpr (std::is_same_v<S, T>) {
      transpose(from + c * stride, stride, rows + c, row_stride, n, range.n);
    } else {
      T buffer[kGatheredClasses * kMaxGathered];
      convert_runs(from + c * stride, stride, buffer, range.n, n, range.n);
      transpose(buffer, range.n, rows + c, row_stride, n, range.n);
    }
  }
}

// The inverse of gather_rows.
template <class T, class G>
FASTOPT_CLONES void scatter_rows(const T* rows, int64_t row_stride, G* to, const PositionRange& range) {
  const int64_t stride = range.layout.class_stride, n_classes = range.layout.n_classes;
  to += range.offset(0);
  for (int64_t c = 0; c < n_classes; c += kGatheredClasses) {
    const int64_t n = std::min(kGatheredClasses, n_classes - c);
    if constexpr (std::is_same_v<T, G>) {
      transpose(rows + c, row_stride, to + c * stride, stride, range.n, n);
    } else {
      T buffer[kGatheredClasses * kMaxGathered];
      transpose(rows + c, row_stride, buffer, range.n, range.n, n);
      convert_runs(buffer, range.n, to + c * stride, stride, n, range.n);
    }
  }
}

// Computes `n` positions of one image from `first` on; returns the sum of their losses.
template <class S, TargetKind kTarget, bool kWantsGrad>
double run_gathered(CrossEntropyCall& call, int64_t first, int64_t n) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = call.problem;
  const int64_t n_classes = p.logits_layout.n_classes;
  // An odd number of lines, or the rows' lines would lie in few sets of the caches and push each other out.
  constexpr int64_t kPerLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  const int64_t row_stride = (divide_up(n_classes, kPerLine) | 1) * kPerLine;
  const auto gather = [&](const void* from, const LogitLayout& layout, int slot) {
    T* rows = scratch<T>(n * row_stride, slot);
    gather_rows(static_cast<const S*>(from), {layout, first, n}, rows, row_stride);
    return rows;
  };
  T* rows = gather(p.logits, p.logits_layout, 1);
  const T* probabilities = nullptr;
  if constexpr (!has_index(kTarget)) probabilities = gather(p.probabilities, p.probabilities_layout, 2);
  double* offsets = scratch<double>(n_classes / kRowBlock + 1, 0);

  CompensatedSum sum;
  for (int64_t j = 0; j < n; ++j) {
    Row<T> row{};
    row.n_classes = n_classes;
    row.logits = row.grad = row.exps = rows + j * row_stride;
    row.offsets = offsets;
    TargetTerms<T> terms = target_terms<T>(p);
    double loss = 0;
    bool is_kept = true;
    if constexpr (has_index(kTarget)) {
      is_kept = read_target(call, first + j, row, terms);
    } else {
      row.probabilities = probabilities + j * row_stride;
    }
    if (is_kept) {
      RowTotals totals;
      RowGradient<T, kTarget> gradient;
      loss = read_row<T, kTarget, kWantsGrad>(row, terms, totals, gradient);
      if constexpr (kWantsGrad) {
        gradient.begin(row, terms, totals, p.grad_scale, /*streams=*/false);
        write_row(gradient);
      }
    } else if constexpr (kWantsGrad) {
      memset(row.grad, 0, n_classes * sizeof(T));
    }
    store_loss<S>(p, first + j, loss);
    sum.add(loss);
  }
  if constexpr (kWantsGrad) {
    scatter_rows(rows, row_stride, static_cast<gradient_t<S>*>(p.grad), {p.grad_layout, first, n});
  }
  return sum.total();
}

}  // namespace fastopt::cpu
