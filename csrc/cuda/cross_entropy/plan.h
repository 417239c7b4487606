// Cross-entropy on the GPU: loss, and gradient if wanted, without waiting for the device.
#pragma once

#include "cuda/launch.h"
#include "cuda/library.h"

namespace fastopt::cuda {

// The threads that share a row: one (each position), a warp, a block, or several blocks.
enum class KernelKind : int8_t { kPositions, kWarpRows, kBlockRows, kSplitRows };

struct CrossEntropyPlan {
  KernelKind kernel;
  int32_t n_blocks, n_threads, shared_bytes;
  int32_t n_splits;   // blocks of a row, for kSplitRows
  int32_t n_tallies;  // blocks that count targets first, where there are many
  bool is_single;     // one block, which computes the totals itself instead of in a launch before
};

int workspace_bytes(const CrossEntropy& call, int64_t* bytes);
int launch(const CrossEntropy& call, cudaStream_t stream);

}  // namespace fastopt::cuda
