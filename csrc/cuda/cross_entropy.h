// Cross-entropy on the GPU: loss, and gradient if wanted, without waiting for the device.
#pragma once

#include "cuda/launch.h"
#include "cuda/library.h"

namespace fastopt::cuda {

// Who takes a row: a thread (each position), a warp, a block, or several blocks.
enum class Road : int8_t { kPositions, kWarpRows, kBlockRows, kSplitRows };

struct CrossEntropyPlan {
  Road road;
  int32_t n_blocks, n_threads, shared_bytes;
  int32_t n_splits;   // blocks of a row, for kSplitRows
  int32_t n_tallies;  // blocks that count targets first, where there are many
  bool is_single;     // one block, which finds for itself what else a launch before must find
};

int workspace_bytes(const CrossEntropy& call, int64_t* bytes);
int launch(const CrossEntropy& call, cudaStream_t stream);

}  // namespace fastopt::cuda
