// Memory of one thread that outlives a call, so that a training step does not allocate it again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt::cpu {

// What a thread keeps of each slot when its work is done; what is larger is freed.
constexpr size_t kMaxKeptScratch = size_t{1} << 20;
constexpr int kScratchSlots = 3;

// n bytes that begin a cache line, not initialised. Throws std::bad_alloc.
void* scratch_bytes(size_t n, int slot);
void release_large_scratch();

template <class T>
T* scratch(int64_t n, int slot) {
  return static_cast<T*>(scratch_bytes(n * sizeof(T), slot));
}

}  // namespace fastopt::cpu
