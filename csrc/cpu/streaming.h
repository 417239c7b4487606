// The size from which gradients are written past the caches.
#pragma once

#include <cstdint>

namespace fastopt::cpu {

// Sets the bytes of logits and gradient beyond which a gradient is written past the caches; returns the previous
// number, initially the size of the last-level cache. For tests.
int64_t set_streaming_threshold(int64_t n_bytes);

// True if the gradient is streamed where logits and gradient have n_bytes.
bool exceeds_caches(int64_t n_bytes);

}  // namespace fastopt::cpu
