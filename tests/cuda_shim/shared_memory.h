// Shared memory: its limits, garbage in it when a block begins, and checks that a block has kept within its own.
#pragma once

#if defined(__linux__)
#include <link.h>  // dl_iterate_phdr
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>  // memset, memcpy, memcmp
#include <map>
#include <vector>

#include "block.h"
#include "runtime_types.h"

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

// Dynamic shared memory, between two guard areas

inline std::vector<char> shared_memory;
inline char* dynamic_shared = nullptr;
inline size_t dynamic_shared_bytes = 0;

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

// Limits of dynamic shared memory, by the kernel; of those for which one was set

inline std::map<const void*, size_t> dynamic_shared_limits;
inline int n_changed_limits = 0;

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

}  // namespace fastopt_shim
