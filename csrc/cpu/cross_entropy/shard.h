// Cross-entropy of rows whose classes are sharded over processes: each row's totals over this process's classes, and
// the gradient of these classes from the totals over all processes. The caller does the exchange in between.
#pragma once

#include "common.h"
#include "cpu/parallel.h"

namespace fastopt::cpu {

// Rows of fewer classes are too short for kernels that take one row at a time.
constexpr int64_t kMinShardClasses = 65;

// Rows of logits: the classes of this process.
struct LogitShard {
  DType dtype;
  const void* logits;
  int64_t n_rows, n_classes, row_stride;
  const bool* is_kept;  // of each row; false for ignored targets
  const void* weight;   // of each class, in the compute type, or null
  bool is_smoothed;     // by label smoothing
};

// Totals of each row over this process's classes; the sums of a row that is not kept are 0.
struct ShardTotals {
  double* max;
  double* exp_sum;    // sum exp(x - max)
  double* logit_sum;  // sum w (x - max); only if smoothed
};

// Inputs of the gradient of each row's loss, times scale; the totals are those over all processes.
struct ShardGradient {
  const int64_t* target;  // index into this process's classes; outside [0, n_classes) if another process has it
  const double* max;
  const double* exp_sum;
  const double* smoothed_sum;  // sum of smoothed q over all classes
  const double* on;            // q added at the target
  const double* scale;
  double off;  // smoothed q of a class of weight 1
  void* grad;  // dtype of the logits
  int64_t row_stride;
};

void shard_totals(const LogitShard& shard, const Threads& threads, const ShardTotals& totals);
void shard_gradient(const LogitShard& shard, const Threads& threads, const ShardGradient& gradient);

}  // namespace fastopt::cpu
