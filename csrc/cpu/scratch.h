// Memory of one thread that outlives a call, so that a training step does not allocate it again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt::cpu {

// A thread keeps a slot of up to this size when its work is done; a larger one is freed.
constexpr size_t kMaxKeptScratch = size_t{1} << 20;
constexpr int kScratchSlots = 3;

// n uninitialised bytes, aligned to a cache line. Throws std::bad_alloc.
void* scratch_bytes(size_t n, int slot);
void release_large_scratch();

template <class T>
T* scratch(int64_t n, int slot) {
  return static_cast<T*>(scratch_bytes(n * sizeof(T), slot));
}

}  // namespace fastopt::cpu
