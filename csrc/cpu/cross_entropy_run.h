// What all threads of one cross-entropy share.
#pragma once

#include <algorithm>  // copy_n
#include <atomic>

#include "losses/cross_entropy.h"

namespace fastopt::cpu {

// Copies targets, which another thread or process may write meanwhile: what is checked is what is used, for the
// compiler may not read them again behind the barrier.
inline void copy_targets(const int64_t* from, int64_t n, int64_t* to) {
  std::copy_n(from, n, to);
  asm volatile("" ::: "memory");
}

struct CrossEntropyRun {
  const CrossEntropyProblem& problem;
  const bool streams;                       // gradients go past the caches
  std::atomic<bool> has_bad_target{false};  // a target is not a class, though all were when they were checked

  // Copies the targets of n positions from `first` on, and notes if one is not a class.
  void copy_targets(int64_t first, int64_t n, int64_t* targets) {
    cpu::copy_targets(problem.target + first, n, targets);
    int64_t n_bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      n_bad += (targets[i] != problem.ignore_index) & !is_class(targets[i], problem.logits_layout.n_classes);
    }
    if (n_bad > 0) has_bad_target = true;
  }
};

}  // namespace fastopt::cpu
