// Class-index targets: checked and tallied before a loss indexes by them.
#pragma once

#include <algorithm>  // copy_n

#include "cpu/parallel.h"
#include "losses/cross_entropy.h"

namespace fastopt::cpu {

struct TargetTally {
  double weight_sum = 0;   // of the targets' classes, 1 each without weights; not of those that are ignore_index
  bool is_valid = true;    // all other targets are classes
  int64_t bad_target = 0;  // the first that is not
};

// Reads the targets once, before anything is indexed by them.
TargetTally tally_targets(const CrossEntropyProblem& problem, const Threads& threads);

// The sum of the weights of all classes.
double sum_weights(const CrossEntropyProblem& problem);

// Copies targets, which another thread or process may write meanwhile. The barrier keeps the compiler from reading them
// again, so that the checked value is the used one.
inline void copy_targets(const int64_t* from, int64_t n, int64_t* to) {
  std::copy_n(from, n, to);
  asm volatile("" ::: "memory");
}

// The number of targets that are neither classes nor ignored.
int64_t count_bad_targets(const int64_t* targets, int64_t n, int64_t n_classes, int64_t ignore_index);

}  // namespace fastopt::cpu
