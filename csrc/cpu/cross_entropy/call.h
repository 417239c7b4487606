// State shared by all threads of one cross-entropy call.
#pragma once

#include <algorithm>  // min
#include <atomic>

#include "cpu/cross_entropy/targets.h"
#include "cpu/parallel.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

constexpr int64_t kLogitsPerTask = 2048;  // of rows
// Logits below which another thread costs more than it saves.
constexpr int64_t kMinLogitsPerThread = 4096;

// No more threads than pay off for n_logits.
inline Threads at_most(const Threads& threads, int64_t n_logits) {
  return {static_cast<int>(std::min<int64_t>(threads.count, n_logits / kMinLogitsPerThread)), threads.on_each};
}

template <class T>
TargetTerms<T> target_terms(const CrossEntropyProblem& p) {
  const double smoothing = p.label_smoothing;
  const double off = smoothing / p.logits_layout.n_classes;
  return {1 - smoothing, off * p.weight_sum, T(off), T(1 - smoothing), static_cast<const T*>(p.weight)};
}

// Stores the loss of a position if the losses of all positions are wanted.
template <class S>
void store_loss(const CrossEntropyProblem& problem, int64_t position, double loss) {
  if (problem.losses) store(static_cast<S*>(problem.losses)[position], static_cast<compute_t<S>>(loss));
}

struct CrossEntropyCall {
  const CrossEntropyProblem& problem;
  const bool streams;                       // gradients go past the caches
  std::atomic<bool> has_bad_target{false};  // a target is not a class, though all were when they were checked

  // A copy of a position's target. A bad target sets has_bad_target and is returned as ignore_index.
  int64_t read_target(int64_t position) {
    int64_t target;
    copy_targets(problem.target + position, 1, &target);
    return checked(target);
  }
  // The same for n positions from `first` on.
  void read_targets(int64_t first, int64_t n, int64_t* targets) {
    copy_targets(problem.target + first, n, targets);
    if (count_bad_targets(targets, n, problem.logits_layout.n_classes, problem.ignore_index) == 0) return;
    for (int64_t i = 0; i < n; ++i) targets[i] = checked(targets[i]);
  }

 private:
  int64_t checked(int64_t target) {
    if (!is_bad_target(target, problem.logits_layout.n_classes, problem.ignore_index)) return target;
    has_bad_target = true;
    return problem.ignore_index;
  }
};

}  // namespace fastopt::cpu
