// A launch: limits that a device enforces, the order of blocks, the contents of shared memory; one launch at a time.
#pragma once

#include <pthread.h>

#if defined(__linux__)
#include <link.h>  // dl_iterate_phdr
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>  // memset, memcpy, memcmp
#include <map>
#include <mutex>
#include <numeric>  // gcd
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"
#include "runtime_types.h"
#include "schedule.h"

// Static shared memory is thread-local storage: a library has one block of it, whose bounds can be found and which can
// be filled (in a program linked with -static, libc's would be too). AddressSanitizer guards global variables only, so
// there it is an ordinary one and starts as it was left.
#if defined(__linux__) && !defined(FASTOPT_SHIM_ASAN)
#define FASTOPT_SHIM_FILLS_STATIC_SHARED 1
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

namespace [[gnu::visibility("hidden")]] fastopt_shim {

inline constexpr int kMaxThreadsZ = 64;
inline constexpr int kMaxBlocksX = 0x7fffffff;
inline constexpr int kMaxBlocksYZ = 0xffff;
inline constexpr size_t kMaxArgumentBytes = 32764;

// Shared memory of a block, static and dynamic together: without a call of cudaFuncSetAttribute, and with one.
inline constexpr size_t kDefaultSharedBytesLimit = size_t{48} << 10;
inline constexpr size_t kMaxSharedBytesOptIn = size_t{227} << 10;
// Static shared memory of a kernel: an upper bound, the same for all of them, for a C++ compiler does not say which
// variables a kernel uses. So shared memory that is granted here is granted by a device, too. tests/cuda/report.py
// checks the bound for nvcc's kernels; here a block that writes more ends the process, unless with AddressSanitizer.
inline constexpr size_t kStaticSharedBytes = 512;

// All bits set: NaN in each floating-point type, -1 in each integer.
inline constexpr int kGarbage = 0xff;
inline constexpr unsigned char kGuard = 0xe5;
inline constexpr size_t kGuardBytes = 1024;

struct Grid {
  const char* kernel;
  const void* address;
  dim3 grid_dim, block_dim;
  size_t shared_bytes;
  void (*body)(const void* context);
  const void* context;
};

inline std::mutex launch_mutex;
// The limit of dynamic shared memory of each kernel for which it was set.
inline std::map<const void*, size_t> dynamic_shared_limits;
inline int n_changed_limits = 0;
inline int error_to_come = cudaSuccess;
inline bool has_seed = false;
inline long long seed = -1;
constinit inline thread_local cudaError_t last_error = cudaSuccess;

// The running launch, whose blocks run in steps of `stride`.
inline uint64_t n_blocks = 0, n_blocks_left = 0, block_rank = 0, stride = 1;

// Shared memory, between two guard areas.
inline std::vector<char> shared_memory;
inline char* dynamic_shared = nullptr;
inline size_t dynamic_shared_bytes = 0;

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

// Static shared memory

#if defined(FASTOPT_SHIM_FILLS_STATIC_SHARED)

struct ThreadLocalBlock {
  char* begin;
  size_t bytes;
};
constinit inline thread_local ThreadLocalBlock known_thread_local_block{nullptr, 0};

// This library's thread-local storage in this host thread.
inline ThreadLocalBlock find_thread_local_block() {
  if (known_thread_local_block.begin) return known_thread_local_block;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void*) {
        char* begin = static_cast<char*>(library->dlpi_tls_data);
        const char* inside = reinterpret_cast<const char*>(&known_thread_local_block);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& header = library->dlpi_phdr[i];
          if (header.p_type != PT_TLS || inside < begin || inside >= begin + header.p_memsz) continue;
          known_thread_local_block = {begin, header.p_memsz};
          return 1;
        }
        return 0;
      },
      nullptr);
  return known_thread_local_block;
}

// Keeps the host's thread-local variables over a launch, and fills shared ones with garbage at each block.
class StaticShared {
 public:
  void begin_launch() {
    block_ = find_thread_local_block();
    kept_.assign(block_.begin, block_.begin + block_.bytes);
  }
  void fill() const { memset(block_.begin, kGarbage, block_.bytes); }
  void check() const {
    const auto is_written = [](char c) { return static_cast<unsigned char>(c) != kGarbage; };
    const size_t written = static_cast<size_t>(std::count_if(block_.begin, block_.begin + block_.bytes, is_written));
    if (written > kStaticSharedBytes) {
      fail("a block wrote %zu bytes of static shared memory; kStaticSharedBytes, which launches count with, is %zu",
           written, kStaticSharedBytes);
    }
  }
  void end_launch() const { memcpy(block_.begin, kept_.data(), block_.bytes); }

 private:
  ThreadLocalBlock block_{nullptr, 0};
  std::vector<char> kept_;
};

#else

class StaticShared {
 public:
  void begin_launch() {}
  void fill() const {}
  void check() const {}
  void end_launch() const {}
};

#endif

inline StaticShared static_shared;

// Dynamic shared memory

inline void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool on) {
#if defined(FASTOPT_SHIM_ASAN)
  on ? __asan_poison_memory_region(begin, bytes) : __asan_unpoison_memory_region(begin, bytes);
#endif
}

inline void place_dynamic_shared(size_t bytes) {
  const size_t needed = bytes + 2 * kGuardBytes + 16;
  if (shared_memory.size() < needed) shared_memory.resize(needed);
  const uintptr_t first = reinterpret_cast<uintptr_t>(shared_memory.data()) + kGuardBytes;
  dynamic_shared = reinterpret_cast<char*>((first + 15) & ~uintptr_t{15});
  dynamic_shared_bytes = bytes;
  memset(dynamic_shared - kGuardBytes, kGuard, kGuardBytes);
  memset(dynamic_shared + bytes, kGuard, kGuardBytes);
  poison(dynamic_shared - kGuardBytes, kGuardBytes, true);
  poison(dynamic_shared + bytes, kGuardBytes, true);
}

inline void check_guards() {
#if !defined(FASTOPT_SHIM_ASAN)
  static const std::vector<unsigned char> intact(kGuardBytes, kGuard);
  const char* end = dynamic_shared + dynamic_shared_bytes;
  if (memcmp(dynamic_shared - kGuardBytes, intact.data(), kGuardBytes) != 0) {
    fail("a thread wrote before the beginning of dynamic shared memory");
  }
  if (memcmp(end, intact.data(), kGuardBytes) != 0) {
    const auto* guard = reinterpret_cast<const unsigned char*>(end);
    const auto written = std::find_if(guard, guard + kGuardBytes, [](unsigned char c) { return c != kGuard; });
    fail("a thread wrote %zu bytes past the end of the %zu bytes of dynamic shared memory",
         static_cast<size_t>(written - guard), dynamic_shared_bytes);
  }
#endif
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

inline size_t dynamic_shared_limit(const void* kernel) {
  const auto found = dynamic_shared_limits.find(kernel);
  return found == dynamic_shared_limits.end() ? kDefaultSharedBytesLimit - kStaticSharedBytes : found->second;
}

inline cudaError_t set_dynamic_shared_limit(const void* kernel, size_t bytes) {
  if (bytes > kMaxSharedBytesOptIn - kStaticSharedBytes) return cudaErrorInvalidValue;
  const auto [entry, is_new] = dynamic_shared_limits.try_emplace(kernel, bytes);
  n_changed_limits += !is_new && entry->second != bytes;
  entry->second = bytes;
  return cudaSuccess;
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
