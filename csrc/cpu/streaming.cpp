#include "cpu/streaming.h"

#include <atomic>
#include <cinttypes>  // SCNd64
#include <cstdio>     // fopen, fscanf

namespace fastopt::cpu {
namespace {

// Size of the last-level cache of one processor. sysconf returns the sum over all of them on some machines.
int64_t last_level_cache() {
  int64_t n_kibibytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%" SCNd64 "K", &n_kibibytes) != 1) n_kibibytes = 0;
    std::fclose(file);
  }
  return (n_kibibytes > 0 ? n_kibibytes : 32 << 10) << 10;
}

// Gradients are streamed past the caches if the logits and they are larger than this.
std::atomic<int64_t>& max_cached_bytes() {
  static std::atomic<int64_t> n_bytes{last_level_cache()};
  return n_bytes;
}

}  // namespace

int64_t set_streaming_threshold(int64_t n_bytes) { return max_cached_bytes().exchange(n_bytes); }

bool exceeds_caches(int64_t n_bytes) { return n_bytes > max_cached_bytes().load(std::memory_order_relaxed); }

}  // namespace fastopt::cpu
