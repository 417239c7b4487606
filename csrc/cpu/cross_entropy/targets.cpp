#include "cpu/cross_entropy/targets.h"

#include <algorithm>  // min
#include <vector>

#include "cpu/cross_entropy/call.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"

namespace fastopt::cpu {
namespace {

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

}  // namespace fastopt::cpu
