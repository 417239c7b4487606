// Cross-entropy of rows whose classes are spread over processes: what this process's classes add to a row's loss, and
// their gradient from what all processes have added. The exchange in between is the caller's.
#pragma once

#include "common.h"
#include "cpu/parallel.h"

namespace fastopt::cpu {

// Of fewer classes, rows are worth too little to be walked one by one.
constexpr int64_t kMinShardClasses = 65;

// The classes of this process, as rows.
struct LogitShard {
  DType dtype;
  const void* logits;
  int64_t n_rows, n_classes, row_stride;
  const bool* is_kept;  // of each row; one that is not counts for nothing
  const void* weight;   // of each class, in the compute type, or null
  bool is_smoothed;     // by label smoothing
};

// Of each row, over its classes here. Of one that is not kept, the sums are 0.
struct ShardTotals {
  double* max;
  double* exp_sum;    // sum exp(x - max)
  double* logit_sum;  // sum w (x - max); only if smoothed
};

// Of each row: the gradient of its loss times scale, from what the classes of all processes have added.
struct ShardGradient {
  const int64_t* target;  // class here; not in [0, n_classes) where another process has it
  const double* max;
  const double* exp_sum;
  const double* spread_sum;  // q that is spread over all classes
  const double* on;          // q that is added at the target
  const double* scale;
  double off;  // q of a class of weight 1, but for what is added at the target
  void* grad;  // dtype of the logits
  int64_t row_stride;
};

void shard_totals(const LogitShard& shard, const Threads& threads, const ShardTotals& totals);
void shard_gradient(const LogitShard& shard, const Threads& threads, const ShardGradient& gradient);

}  // namespace fastopt::cpu
