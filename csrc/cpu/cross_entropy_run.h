// What all threads of one cross-entropy share.
#pragma once

#include <algorithm>  // copy_n, min
#include <atomic>

#include "cpu/parallel.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

constexpr int64_t kLogitsPerTask = 2048;  // of rows
// Logits below which another thread costs more than it saves.
constexpr int64_t kMinLogitsPerThread = 4096;

// As many threads as so many logits are worth.
inline Threads at_most(const Threads& threads, int64_t n_logits) {
  return {static_cast<int>(std::min<int64_t>(threads.count, n_logits / kMinLogitsPerThread)), threads.on_each};
}

// Copies targets, which another thread or process may write meanwhile: what is checked is what is used, for the
// compiler may not read them again behind the barrier.
inline void copy_targets(const int64_t* from, int64_t n, int64_t* to) {
  std::copy_n(from, n, to);
  asm volatile("" ::: "memory");
}

// The loss of a position, where each one's is wanted.
template <class S>
void store_loss(const CrossEntropyProblem& problem, int64_t position, double loss) {
  if (problem.losses) store(static_cast<S*>(problem.losses)[position], static_cast<compute_t<S>>(loss));
}

// How many of them are neither classes nor ignored.
int64_t count_bad_targets(const int64_t* targets, int64_t n, int64_t n_classes, int64_t ignore_index);

struct CrossEntropyRun {
  const CrossEntropyProblem& problem;
  const bool streams;                       // gradients go past the caches
  std::atomic<bool> has_bad_target{false};  // a target is not a class, though all were when they were checked

  // A copy of a position's target; one that is not a class is noted, and counts as ignored.
  int64_t read_target(int64_t position) {
    int64_t target;
    copy_targets(problem.target + position, 1, &target);
    return checked(target);
  }
  // Likewise of n positions from `first` on.
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
