// Plans a cross-entropy: kernel, number of blocks, and layout of the workspace.
#include "cuda/cross_entropy/plan.h"

#include <algorithm>  // max, min

#include "cuda/cross_entropy/launch_kernels.cuh"
#include "cuda/device.h"

namespace fastopt::cuda {
namespace {

// Rows of up to this many classes take a thread each: a warp would leave most lanes idle.
constexpr int64_t kMaxThreadClasses = 32;
constexpr int64_t kMaxWarpClasses = 1024;
// Rows of at least this many classes are divided among blocks if there are fewer rows than multiprocessors.
constexpr int64_t kMinSplitClasses = 16384;
constexpr int64_t kMinClassesPerSplit = 4096;
constexpr int64_t kMaxSplits = 64;
// Problems of up to this size are solved by one block, faster than another launch would start.
constexpr int64_t kMaxSingleLogits = 32768;
constexpr int64_t kMaxSingleRows = 64;
constexpr int kPositionThreads = 128;
constexpr int kThreadsPerMultiprocessor = 2048;
// Threads of the wide-row kernel per multiprocessor, limited by registers.
constexpr int kResidentThreads = 1024;
// Bytes of a row for each thread: twice its loads in flight.
constexpr int64_t kBytesPerThread = 128;
// Targets that one block counts; of more targets, several blocks do.
constexpr int64_t kMaxTargetsPerBlock = 32768;
constexpr int64_t kMaxTallies = 128;
// Shared memory that each resident block takes beyond its request.
constexpr int64_t kReservedSharedBytes = 2048;

int64_t element_bytes(DType dtype) {
  return with_stored_type(dtype, [](auto stored) { return static_cast<int64_t>(sizeof(stored)); });
}

int plan_call(const CrossEntropy& call, CrossEntropyPlan* plan) {
  Device device;
  if (const int error = current_device(&device)) return error;
  const LogitLayout& layout = call.problem.logits_layout;
  const int64_t n_positions = layout.n_outer * layout.n_inner;
  const int64_t n_classes = layout.n_classes;
  const int64_t n_multiprocessors = device.n_multiprocessors;
  *plan = {};
  int64_t n_blocks = 1;
  if (!layout.is_rows() || n_classes <= kMaxThreadClasses) {
    plan->kernel = KernelKind::kPositions;
    const bool fits_block = n_positions <= kMaxPositionThreads && n_positions * n_classes <= kMaxSingleLogits;
    plan->n_threads = fits_block ? static_cast<int>(divide_up(n_positions, kWarp)) * kWarp : kPositionThreads;
    n_blocks = std::min(divide_up(n_positions, plan->n_threads),
                        n_multiprocessors * (kThreadsPerMultiprocessor / kPositionThreads));
  } else if (n_classes <= kMaxWarpClasses) {
    plan->kernel = KernelKind::kWarpRows;
    plan->n_threads = kWarpRowsThreads;
    const bool fits_block = n_positions <= kMaxSingleRows && n_positions * n_classes <= kMaxSingleLogits;
    const int64_t rows_per_block = kWarpRowsThreads / kWarp;
    if (!fits_block) {
      n_blocks = std::min(divide_up(n_positions, rows_per_block),
                          n_multiprocessors * (kThreadsPerMultiprocessor / kWarpRowsThreads));
    }
  } else if (n_classes >= kMinSplitClasses && n_positions < n_multiprocessors) {
    plan->kernel = KernelKind::kSplitRows;
    plan->n_threads = kSplitThreads;
    // At most two blocks per multiprocessor: more would run in a second, mostly empty wave.
    plan->n_splits = static_cast<int>(
        std::min({divide_up(n_classes, kMinClassesPerSplit), 2 * n_multiprocessors / n_positions, kMaxSplits}));
    n_blocks = n_positions * plan->n_splits;
  } else {
    plan->kernel = KernelKind::kBlockRows;
    const int64_t bytes = n_classes * element_bytes(call.problem.dtype);
    int n_threads = 128;
    while (n_threads < kMaxBlockRowsThreads && n_threads * kBytesPerThread < bytes) n_threads *= 2;
    plan->n_threads = n_threads;
    int64_t per_multiprocessor = std::max(kResidentThreads / n_threads, 1);
    // A row is kept in shared memory if two blocks still fit: while one reduces, the other moves memory.
    const int64_t stage_bytes = bytes + kAccessBytes;
    const int64_t fitting = device.shared_bytes_per_multiprocessor / (stage_bytes + kReservedSharedBytes);
    if (call.problem.grad && fitting >= 2 && stage_bytes <= device.max_shared_bytes_per_block - kReservedSharedBytes) {
      plan->shared_bytes = static_cast<int>(stage_bytes);
      per_multiprocessor = std::min(per_multiprocessor, fitting);
    }
    n_blocks = std::min(n_positions, n_multiprocessors * per_multiprocessor);
  }
  if (n_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  plan->n_blocks = static_cast<int>(n_blocks);
  plan->is_single = n_blocks == 1;
  if (!plan->is_single && call.problem.target && call.reduction == Reduction::kMean &&
      n_positions > kMaxTargetsPerBlock) {
    plan->n_tallies = static_cast<int>(std::min(divide_up(n_positions, kPrepareThreads * 4), kMaxTallies));
  }
  return cudaSuccess;
}

// Lays the workspace out from `base`; returns its size.
int64_t lay_out(const CrossEntropy& call, const CrossEntropyPlan& plan, CrossEntropyWork* work) {
  char* const base = static_cast<char*>(call.workspace);
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* const taken = base + size;
    size += divide_up(bytes, kAccessBytes) * kAccessBytes;
    return taken;
  };
  *work = {call.problem, call.reduction, call.loss,      nullptr,       nullptr,
           nullptr,      nullptr,        plan.n_tallies, plan.n_splits, plan.shared_bytes > 0};
  if (!plan.is_single) {
    work->totals = reinterpret_cast<Totals*>(take(sizeof(Totals)));
    work->partials = reinterpret_cast<double*>(take(plan.n_blocks * sizeof(double)));
    work->tallies = reinterpret_cast<double*>(take(plan.n_tallies * sizeof(double)));
    if (plan.kernel == KernelKind::kSplitRows) work->parts = take(plan.n_blocks * sizeof(RowPart<double>));
  }
  return size;
}

}  // namespace

int workspace_bytes(const CrossEntropy& call, int64_t* bytes) {
  CrossEntropyPlan plan;
  if (const int error = plan_call(call, &plan)) return error;
  CrossEntropyWork work;
  *bytes = lay_out(call, plan, &work);
  return cudaSuccess;
}

int launch(const CrossEntropy& call, cudaStream_t stream) {
  CrossEntropyPlan plan;
  if (const int error = plan_call(call, &plan)) return error;
  CrossEntropyWork work;
  lay_out(call, plan, &work);
  switch (call.problem.dtype) {
    case DType::kFloat64: return launch_cross_entropy<double>(plan, work, stream);
    case DType::kFloat32: return launch_cross_entropy<float>(plan, work, stream);
    case DType::kBFloat16: return launch_cross_entropy<BFloat16>(plan, work, stream);
    case DType::kFloat16: return launch_cross_entropy<Half>(plan, work, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastopt::cuda
