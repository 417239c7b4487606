// The running block: its threads, where each of them waits, and the messages about errors. All of it is global, since
// grid.h lets one launch run at a time.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <source_location>

#include "fibers.h"
#include "vector_types.h"

namespace [[gnu::visibility("hidden")]] fastopt_shim {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxWarps = kMaxThreads / kWarpSize;

// A collective operation. Each lane of a warp gets the value of the lane that it names or, if there is a fold, the fold
// of all values.
struct Collective {
  const char* name;
  uint64_t (*fold)(uint64_t, uint64_t) = nullptr;
  bool of_block = false;
  bool needs_all_named = true;  // otherwise the mask may name exited lanes
};

struct Warp;

struct Thread {
  uint3 index;
  int rank;
  int lane;
  Warp* warp;
  Fiber* fiber;  // null until the thread first waits
  const Collective* collective;
  uint32_t mask;
  int source;
  uint64_t value;
  uint64_t result;
  std::source_location where;
};

// One bit for each lane.
struct Warp {
  Thread* lanes;
  int rank;
  uint32_t live;
  uint32_t ready;
  uint32_t at_collective;
  uint32_t at_barrier;
};

struct Block {
  // The launch.
  const char* kernel = "";
  void (*body)(const void* context) = nullptr;
  const void* context = nullptr;
  dim3 grid_dim, block_dim{0, 0, 0};
  bool shuffled = false;
  uint64_t random_state = 0;

  // The block.
  uint3 index{};
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int n_threads = 0, n_warps = 0, n_live = 0;
  uint32_t ready_warps = 0;
  Thread* current = nullptr;

  // __syncthreads and its variants.
  int n_at_barrier = 0;
  int n_true = 0;
  int barrier_result = 0;
  const Thread* first_at_barrier = nullptr;
};

inline Block block;

// Messages

inline void print_threads() {
  const auto same = [](const Thread& a, const Thread& b) {
    return a.collective == b.collective && a.where.line() == b.where.line() && a.mask == b.mask;
  };
  const auto state = [](const Thread& thread) -> char {
    const uint32_t lane = 1u << thread.lane;
    if (!(thread.warp->live & lane)) return 'e';
    return (thread.warp->at_collective | thread.warp->at_barrier) & lane ? 'w' : 'r';
  };
  for (int first = 0, last; first < block.n_threads; first = last + 1) {
    const Thread& thread = block.threads[first];
    for (last = first; last + 1 < block.n_threads; ++last) {
      const Thread& next = block.threads[last + 1];
      if (state(next) != state(thread) || (state(thread) == 'w' && !same(next, thread))) break;
    }
    fprintf(stderr, "  threads %d-%d: ", first, last);
    switch (state(thread)) {
      case 'e': fprintf(stderr, "exited\n"); break;
      case 'r': fprintf(stderr, "running or ready to\n"); break;
      default:
        fprintf(stderr, "wait at %s", thread.collective->name);
        if (!thread.collective->of_block) fprintf(stderr, ", mask 0x%08x", thread.mask);
        fprintf(stderr, " (%s:%u)\n", thread.where.file_name(), thread.where.line());
    }
  }
}

// Prints kernel, block and thread, the position of all threads, and aborts.
[[noreturn, gnu::format(printf, 1, 2), gnu::cold, gnu::noinline]] inline void fail(const char* format, ...) {
  fprintf(stderr, "cuda shim: kernel %s, block (%u, %u, %u)", block.kernel, block.index.x, block.index.y,
          block.index.z);
  if (block.current) {
    const uint3 index = block.current->index;
    fprintf(stderr, ", thread (%u, %u, %u)", index.x, index.y, index.z);
  }
  fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  print_threads();
  fflush(stderr);
  abort();
}

}  // namespace fastopt_shim
