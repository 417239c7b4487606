// Divides a cross-entropy problem into tasks of fixed size, whatever the number of threads, and runs them.
#include "cpu/cross_entropy/solve.h"

#include <algorithm>  // clamp, max, min
#include <atomic>
#include <cinttypes>  // SCNd64
#include <cstdio>     // fopen, fscanf
#include <vector>

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/gathered_rows.h"
#include "cpu/cross_entropy/rows.h"
#include "cpu/cross_entropy/tile.h"
#include "cpu/cross_entropy/tile_copies.h"
#include "cpu/scratch.h"

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

// Size of the last-level cache of one processor. sysconf returns the sum over all of them on some machines.
int64_t last_level_cache() {
  int64_t n_kibibytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%" SCNd64 "K", &n_kibibytes) != 1) n_kibibytes = 0;
    std::fclose(file);
  }
  return (n_kibibytes > 0 ? n_kibibytes : 32 << 10) << 10;
}

// Gradients are streamed past the caches if the logits and they are larger than this.
std::atomic<int64_t>& max_cached_bytes() {
  static std::atomic<int64_t> n_bytes{last_level_cache()};
  return n_bytes;
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

// Computes `n` positions from `first` on as adjacent tiles; returns the sum of their losses.
template <class S, TargetKind kTarget, bool kWantsGrad>
double run_tiles(CrossEntropyCall& call, int64_t first, int64_t n) {
  using T = compute_t<S>;
  const CrossEntropyProblem& p = call.problem;
  const LogitLayout& layout = p.logits_layout;
  const int64_t n_classes = layout.n_classes;

  // Lanes past the last position compute on zeros, so that no vector is left to a scalar loop.
  const int64_t n_wide = n / kTileWidth * kTileWidth, last = tile_width(n - n_wide);
  const int64_t width = n_wide + divide_up(n - n_wide, last) * last;
  T* buffer = layout.is_rows() ? scratch<T>(n_classes * width, 0) : nullptr;
  const auto read = [&](const void* from, const LogitLayout& from_layout, int slot) {
    T* to = scratch<T>(n_classes * width, slot);
    read_tile(static_cast<const S*>(from), {from_layout, first, n}, to, width, buffer);
    return to;
  };
  T* values = read(p.logits, layout, 1);
  const T* probabilities = has_index(kTarget) ? nullptr : read(p.probabilities, p.probabilities_layout, 2);
  const PositionRange next{layout, first + n, n};
  CompensatedSum sum;
  for (int64_t i = 0; i < n; i += tile_width(n - i)) {
    Tile<T> tile{};
    tile.values = values + i;
    tile.stride = width;
    tile.n_classes = n_classes;
    tile.ignore_index = p.ignore_index;
    tile.prefetch = static_cast<const S*>(p.logits) + next.offset(i);
    // The logits of rows are contiguous: with each class, as many are prefetched as the tile has positions.
    tile.prefetch_stride = (layout.is_rows() ? kTileWidth : layout.class_stride) * static_cast<int64_t>(sizeof(S));
    tile.n_positions = std::min(tile_width(n - i), n - i);
    int64_t targets[kTileWidth];
    if constexpr (has_index(kTarget)) {
      call.read_targets(first + i, tile.n_positions, targets);
      std::fill(targets + tile.n_positions, targets + kTileWidth, p.ignore_index);
      tile.target = targets;
    } else {
      tile.probabilities = probabilities + i;
    }
    double losses[kTileWidth];
    const auto terms = target_terms<T>(p);
    sum.add(with_bool(tile_width(n - i) == kTileWidth, [&](auto is_wide) {
      constexpr int64_t kWidth = decltype(is_wide)::value ? kTileWidth : kNarrowTileWidth;
      return tile_cross_entropy<T, kTarget, kWantsGrad, kWidth>(tile, terms, p.grad_scale, losses);
    }));
    for (int64_t j = 0; p.losses && j < tile.n_positions; ++j) store_loss<S>(p, first + i + j, losses[j]);
  }
  if constexpr (kWantsGrad) {
    write_tile(values, width, static_cast<gradient_t<S>*>(p.grad), {p.grad_layout, first, n}, buffer, call.streams);
  }
  return sum.total();
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

double weight_of(const CrossEntropyProblem& p, int64_t c) {
  return p.dtype == DType::kFloat64 ? static_cast<const double*>(p.weight)[c]
                                    : static_cast<double>(static_cast<const float*>(p.weight)[c]);
}

// The sum of the weights of the targets [begin, end) that are not ignored.
template <class T>
FASTOPT_HD double sum_target_weights(const CrossEntropyProblem& p, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 16 * kLanes;
  const T* const weight = static_cast<const T*>(p.weight);
  const int64_t ignore_index = p.ignore_index, n_classes = p.logits_layout.n_classes;
  CompensatedSum sum;
  for (int64_t first = begin; first < end; first += kTogether) {
    int64_t targets[kTogether];
    const int64_t n = std::min(kTogether, end - first);
    copy_targets(p.target + first, n, targets);
    sum.add(sum_of(n, [&](int64_t i) {
      const int64_t target = targets[i];
      const bool is_counted = is_class(target, n_classes) & (target != ignore_index);
      const T value = weight[is_counted ? target : 0];
      return is_counted ? static_cast<double>(value) : 0.0;
    }));
  }
  return sum.total();
}

// The tally of the targets [begin, end).
FASTOPT_CLONES TargetTally tally_part(const CrossEntropyProblem& p, int64_t begin, int64_t end) {
  TargetTally part;
  const int64_t ignore_index = p.ignore_index, n_classes = p.logits_layout.n_classes;
  int64_t n_kept = 0, n_bad = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = p.target[i];
    n_kept += t != ignore_index;
    n_bad += is_bad_target(t, n_classes, ignore_index);
  }
  part.weight_sum = static_cast<double>(n_kept);
  for (int64_t i = begin; n_bad > 0 && i < end; ++i) {
    const int64_t t = p.target[i];
    if (!is_bad_target(t, n_classes, ignore_index)) continue;
    part.is_valid = false;
    part.bad_target = t;
    return part;
  }
  if (p.weight) {
    part.weight_sum = p.dtype == DType::kFloat64 ? sum_target_weights<double>(p, begin, end)
                                                 : sum_target_weights<float>(p, begin, end);
  }
  return part;
}

}  // namespace

FASTOPT_CLONES int64_t count_bad_targets(const int64_t* targets, int64_t n, int64_t n_classes, int64_t ignore_index) {
  int64_t n_bad = 0;
  for (int64_t i = 0; i < n; ++i) n_bad += is_bad_target(targets[i], n_classes, ignore_index);
  return n_bad;
}

TargetTally tally_targets(const CrossEntropyProblem& p, const Threads& threads) {
  const int64_t n = p.logits_layout.n_outer * p.logits_layout.n_inner;
  constexpr int64_t kTargetsPerTask = 16384;
  std::vector<TargetTally> parts(divide_up(n, kTargetsPerTask));
  run_tasks(at_most(threads, n), parts.size(), [&](int64_t task) {
    const int64_t begin = task * kTargetsPerTask;
    parts[task] = tally_part(p, begin, std::min(n, begin + kTargetsPerTask));
  });
  TargetTally tally;
  for (const TargetTally& part : parts) {
    if (tally.is_valid && !part.is_valid) {
      tally.is_valid = false;
      tally.bad_target = part.bad_target;
    }
  }
  tally.weight_sum = sum_of(parts.size(), [&](int64_t i) { return parts[i].weight_sum; });
  return tally;
}

double sum_weights(const CrossEntropyProblem& p) {
  return sum_of(p.logits_layout.n_classes, [&](int64_t c) { return weight_of(p, c); });
}

int64_t set_streaming_threshold(int64_t n_bytes) { return max_cached_bytes().exchange(n_bytes); }

bool exceeds_caches(int64_t n_bytes) { return n_bytes > max_cached_bytes().load(std::memory_order_relaxed); }

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
