// Divides a cross-entropy problem into tasks of fixed size, whatever the number of threads, and runs them.
#include "cpu/cross_entropy/solve.h"

#include <algorithm>    // clamp, max, min
#include <type_traits>  // integral_constant
#include <vector>

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/gathered_rows.h"
#include "cpu/cross_entropy/rows.h"
#include "cpu/cross_entropy/tiles.h"
#include "cpu/scratch.h"
#include "cpu/streaming.h"

namespace fastopt::cpu {
namespace {

// Rows of up to this many classes are transposed, so that a vector holds many rows instead of a part of one; rows of
// more classes too if there are enough rows to fill most of a tile's lanes. For float64, whose vectors hold half as
// many, the row kernel is as fast from fewer classes on.
constexpr int64_t kMaxNarrowClasses = 127, kMaxNarrowDoubles = 64;
constexpr int64_t kMaxClassesOfManyRows = 223, kManyRows = 24;
static_assert(kMaxNarrowClasses >= kLanes && kMaxNarrowDoubles >= kLanes, "a row has at least kLanes classes");
// Elements that are copied into tiles at once: long runs of an image's positions that fit the second-level cache.
constexpr int64_t kTileElements = 32768;
constexpr int64_t kMaxRun = 512;
// Columns of more classes are copied into rows; so are those of an image of so few positions with more classes than
// short tiles take: one tile's lanes would not be full, and two threads would have one task.
constexpr int64_t kMaxTileClasses = 4096;
constexpr int64_t kMinTilePositions = kTileWidth, kMaxShortTileClasses = 256;

enum class KernelKind : int8_t { kTiles, kRows, kGathered };

KernelKind kernel_kind(const LogitLayout& layout, DType dtype) {
  if (layout.is_rows()) {
    const int64_t max_narrow = dtype == DType::kFloat64      ? kMaxNarrowDoubles
                               : layout.n_outer >= kManyRows ? kMaxClassesOfManyRows
                                                             : kMaxNarrowClasses;
    return layout.n_classes <= max_narrow ? KernelKind::kTiles : KernelKind::kRows;
  }
  // By the size of an image, not by their number: a position's loss must not depend on other images.
  const bool is_short = layout.n_inner < kMinTilePositions;
  const bool is_large = layout.n_classes > (is_short ? kMaxShortTileClasses : kMaxTileClasses);
  return is_large ? KernelKind::kGathered : KernelKind::kTiles;
}

// Positions of one task, the same whatever the number of threads: a whole number of tiles, or of rows.
int64_t task_width(const LogitLayout& layout, KernelKind kernel) {
  const int64_t n_logits = layout.is_rows() ? kLogitsPerTask : kTileElements;
  const int64_t width = std::max<int64_t>(n_logits / layout.n_classes, 1);
  if (kernel == KernelKind::kRows) return width;
  if (kernel == KernelKind::kTiles) {
    if (!layout.is_rows() && layout.n_inner <= kMaxShortRun) return kTileWidth / layout.n_inner * layout.n_inner;
    return std::min(divide_up(width, kTileWidth) * kTileWidth, kMaxRun);
  }
  // A share of the positions for each of a few threads, in blocks of 4, which are transposed at once.
  const int64_t share = std::clamp<int64_t>(divide_up(layout.n_outer * layout.n_inner, 4), 2, kMaxGathered);
  const int64_t even = divide_up(layout.n_inner, divide_up(layout.n_inner, share));
  return even <= 2 ? even : divide_up(even, 4) * 4;
}

template <class F>
void with_logit_type(const CrossEntropyProblem& p, F&& f) {
  if (p.dtype == DType::kFloat16 && p.grad && p.is_grad_final) return f(FinalHalf{});
  with_stored_type(p.dtype, f);
}

bool streams_gradient(const CrossEntropyProblem& p) {
  // A gradient that overwrites the logits gains nothing: each line has been read in any case.
  if (!kCanStream || !p.grad || p.grad == p.logits) return false;
  int64_t n_bytes = 0;
  with_logit_type(p, [&](auto stored) {
    using S = decltype(stored);
    const LogitLayout& layout = p.logits_layout;
    n_bytes = layout.n_outer * layout.n_classes * layout.n_inner * (sizeof(S) + sizeof(gradient_t<S>));
  });
  return exceeds_caches(n_bytes);
}

template <class F>
auto with_kind(TargetKind kind, F&& f) {
  switch (kind) {
    case TargetKind::kIndexUniform: return f(std::integral_constant<TargetKind, TargetKind::kIndexUniform>{});
    case TargetKind::kIndexWeighted: return f(std::integral_constant<TargetKind, TargetKind::kIndexWeighted>{});
    case TargetKind::kProbability: return f(std::integral_constant<TargetKind, TargetKind::kProbability>{});
    case TargetKind::kProbabilityWeighted:
      return f(std::integral_constant<TargetKind, TargetKind::kProbabilityWeighted>{});
    default: return f(std::integral_constant<TargetKind, TargetKind::kIndex>{});
  }
}

}  // namespace

bool uses_totals(const LogitLayout& layout, DType dtype) { return kernel_kind(layout, dtype) == KernelKind::kRows; }

bool cross_entropy(const CrossEntropyProblem& p, const Threads& threads, double* loss_sum) {
  const LogitLayout& layout = p.logits_layout;
  const int64_t n_positions = layout.n_outer * layout.n_inner;
  const KernelKind kernel = kernel_kind(layout, p.dtype);
  const int64_t width = task_width(layout, kernel);
  // A task's positions lie in one line of this many.
  const int64_t n_line = kernel == KernelKind::kGathered ? layout.n_inner : n_positions;
  const int64_t tasks_per_line = divide_up(n_line, width);
  const int64_t n_tasks = n_positions / n_line * tasks_per_line;

  CrossEntropyCall call{p, streams_gradient(p)};
  std::vector<double> sums(n_tasks);
  with_logit_type(p, [&](auto stored) {
    using S = decltype(stored);
    with_kind(p.kind(), [&](auto kind) {
      with_bool(p.grad != nullptr, [&](auto wants_grad) {
        constexpr TargetKind kTarget = decltype(kind)::value;
        constexpr bool kWantsGrad = decltype(wants_grad)::value;
        const Threads runners = at_most(threads, n_positions * layout.n_classes);
        share_tasks(runners, n_tasks, [&](auto&& next) {
          RowWorker<S, kTarget, kWantsGrad> run_rows(call);
          for (int64_t task = next(); task < n_tasks; task = next()) {
            const int64_t of_line = (task % tasks_per_line) * width;
            const int64_t first = task / tasks_per_line * n_line + of_line, n = std::min(width, n_line - of_line);
            switch (kernel) {
              case KernelKind::kTiles: sums[task] = run_tiles<S, kTarget, kWantsGrad>(call, first, n); break;
              case KernelKind::kRows: sums[task] = run_rows(first, first + n); break;
              case KernelKind::kGathered: sums[task] = run_gathered<S, kTarget, kWantsGrad>(call, first, n); break;
            }
          }
          run_rows.end();
          release_large_scratch();
          if (call.streams) end_streaming();
        });
      });
    });
  });
  *loss_sum = sum_of(n_tasks, [&](int64_t task) { return sums[task]; });
  return !call.has_bad_target;
}

}  // namespace fastopt::cpu
