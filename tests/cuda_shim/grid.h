// A launch: limits that a device enforces, and the order of blocks; one launch at a time.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstring>  // memset
#include <mutex>
#include <numeric>  // gcd
#include <tuple>
#include <type_traits>
#include <utility>

#include "block.h"
#include "runtime_types.h"
#include "schedule.h"
#include "shared_memory.h"

namespace [[gnu::visibility("hidden")]] fastopt_shim {

inline constexpr int kMaxThreadsZ = 64;
inline constexpr int kMaxBlocksX = 0x7fffffff;
inline constexpr int kMaxBlocksYZ = 0xffff;
inline constexpr size_t kMaxArgumentBytes = 32764;

struct Grid {
  const char* kernel;
  const void* address;
  dim3 grid_dim, block_dim;
  size_t shared_bytes;
  void (*body)(const void* context);
  const void* context;
};

inline std::mutex launch_mutex;
inline int error_to_come = cudaSuccess;
inline bool has_seed = false;
inline long long seed = -1;
constinit inline thread_local cudaError_t last_error = cudaSuccess;

// The running launch, whose blocks run in steps of `stride`.
inline uint64_t n_blocks = 0, n_blocks_left = 0, block_rank = 0, stride = 1;

inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Seeds

inline void set_seed(long long value) {
  has_seed = true;
  seed = value;
  // A step of splitmix64, so that similar seeds give unrelated states.
  uint64_t state = static_cast<uint64_t>(value) + 0x9e3779b97f4a7c15ull;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebull;
  block.random_state = (state ^ (state >> 31)) | 1;
}

inline void set_seed_from_environment() {
  const char* value = getenv("FASTOPT_SHIM_SEED");
  set_seed(value && *value ? atoll(value) : -1);
}

// Blocks

inline Thread* start_block() {
  block.index.x = static_cast<unsigned>(block_rank % block.grid_dim.x);
  block.index.y = static_cast<unsigned>(block_rank / block.grid_dim.x % block.grid_dim.y);
  block.index.z = static_cast<unsigned>(block_rank / block.grid_dim.x / block.grid_dim.y);
  static_shared.fill();
  memset(dynamic_shared, kGarbage, dynamic_shared_bytes);
  return start_threads();
}

inline Thread* next_block() {
  block.current = nullptr;
  check_guards();
  static_shared.check();
  if (--n_blocks_left == 0) return nullptr;
  block_rank = block_rank < n_blocks - stride ? block_rank + stride : block_rank - (n_blocks - stride);
  return start_block();
}

inline cudaError_t check_launch(const Grid& grid) {
  if (error_to_come != cudaSuccess) {
    return static_cast<cudaError_t>(std::exchange(error_to_come, cudaSuccess));
  }
  const dim3 blocks = grid.grid_dim, threads = grid.block_dim;
  const bool some = blocks.x && blocks.y && blocks.z && threads.x && threads.y && threads.z;
  const bool few = blocks.x <= kMaxBlocksX && blocks.y <= kMaxBlocksYZ && blocks.z <= kMaxBlocksYZ &&
                   threads.x <= kMaxThreads && threads.y <= kMaxThreads && threads.z <= kMaxThreadsZ &&
                   threads.x * threads.y * threads.z <= kMaxThreads;
  if (!some || !few) return cudaErrorInvalidConfiguration;
  return grid.shared_bytes > dynamic_shared_limit(grid.address) ? cudaErrorInvalidValue : cudaSuccess;
}

// A child must not find the mutex held by a thread that it does not have.
inline void let_children_launch() {
  static const int registered =
      pthread_atfork([] { launch_mutex.lock(); }, [] { launch_mutex.unlock(); }, [] { launch_mutex.unlock(); });
  (void)registered;
}

inline void run_grid(const Grid& grid) {
  let_children_launch();
  const std::lock_guard lock(launch_mutex);
  if (record(check_launch(grid)) != cudaSuccess) return;
  if (!has_seed) set_seed_from_environment();
  block.kernel = grid.kernel;
  block.body = grid.body;
  block.context = grid.context;
  block.grid_dim = grid.grid_dim;
  block.shuffled = seed >= 0;
  n_blocks = n_blocks_left = uint64_t{grid.grid_dim.x} * grid.grid_dim.y * grid.grid_dim.z;
  block_rank = 0;
  stride = 1;
  if (block.shuffled && n_blocks > 1) {
    // Steps of a length that has no factor in common with their number visit each block once.
    block_rank = random_bits() % n_blocks;
    do stride = 1 + random_bits() % (n_blocks - 1);
    while (std::gcd(stride, n_blocks) != 1);
  }
  shape_block(grid.block_dim);
  place_dynamic_shared(grid.shared_bytes);
  static_shared.begin_launch();
  block.current = start_block();
  switch_to(*take_fiber());
  static_shared.end_launch();
  poison(shared_memory.data(), shared_memory.size(), false);
}

// Bytes of the arguments, laid out one after the other as in a struct.
template <class... Params>
constexpr size_t argument_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)), ...);
  return bytes;
}

template <class... Params, class... Arguments>
void launch(const char* name, void (*kernel)(Params...), dim3 blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t /*stream*/, Arguments&&... arguments) {
  static_assert(std::is_invocable_v<void (*)(Params...), Arguments...>, "arguments do not fit the kernel's parameters");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "arguments are copied to the device byte by byte");
  static_assert(argument_bytes<Params...>() <= kMaxArgumentBytes, "a kernel takes 32764 bytes of arguments at most");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::remove_cv_t<Params>...> arguments;
  };
  const Call call{kernel, std::tuple<std::remove_cv_t<Params>...>(std::forward<Arguments>(arguments)...)};
  const auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  run_grid({name, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, body, &call});
}

}  // namespace fastopt_shim

#define FASTOPT_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ::fastopt_shim::launch(#kernel, kernel, (blocks), (threads), (shared_bytes), (stream)__VA_OPT__(, ) __VA_ARGS__)
#define FASTOPT_DYNAMIC_SHARED(name) char* const name = ::fastopt_shim::dynamic_shared

// For tests, which load the library: seed the order of threads (negative: in order); make the next launch fail; how
// often a kernel's limit of dynamic shared memory, once set, was set to another number.
extern "C" {
__attribute__((used, visibility("default"))) inline void fastopt_shim_seed(long long seed) {
  const std::lock_guard lock(fastopt_shim::launch_mutex);
  fastopt_shim::set_seed(seed);
}
__attribute__((used, visibility("default"))) inline void fastopt_shim_fail_next(int error) {
  const std::lock_guard lock(fastopt_shim::launch_mutex);
  fastopt_shim::error_to_come = error;
}
__attribute__((used, visibility("default"))) inline int fastopt_shim_changed_limits() {
  const std::lock_guard lock(fastopt_shim::launch_mutex);
  return fastopt_shim::n_changed_limits;
}
}
