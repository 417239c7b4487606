// Cross-entropy on the CPU: loss, and gradient if wanted, in one sweep over the logits.
#pragma once

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

// True if the kernel for this layout stores and reuses a problem's `totals`.
bool uses_totals(const LogitLayout& layout, DType dtype);

// Sets the bytes of logits and gradient beyond which a gradient is written past the caches; returns the previous
// number, initially the size of the last-level cache. For tests.
int64_t set_streaming_threshold(int64_t n_bytes);

// True if the gradient is streamed where logits and gradient have n_bytes.
bool exceeds_caches(int64_t n_bytes);

// Computes the sum of the losses, the same for any number of threads; 0 where totals are used, since the loss is known.
// Returns false if a target has been changed to something that is not a class since the targets were tallied.
bool cross_entropy(const CrossEntropyProblem& problem, const Threads& threads, double* loss_sum);

}  // namespace fastopt::cpu
