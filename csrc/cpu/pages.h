// Memory in huge pages where the system has them: page faults of small ones cost more than the arithmetic.
#pragma once

#include <cstddef>

#include "common.h"

namespace fastopt::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// Alignment of a block of n bytes: a huge page if it fills one, else a cache line.
constexpr size_t alignment_of(size_t n) { return n >= kHugePage ? kHugePage : size_t{kLineBytes}; }

// n rounded up to whole pages.
inline size_t rounded_to_pages(size_t n) {
  return static_cast<size_t>(divide_up(static_cast<int64_t>(n), static_cast<int64_t>(alignment_of(n)))) *
         alignment_of(n);
}

// n bytes, advised to be huge pages where they fill any. Freed by std::free; null if there is no memory.
void* allocate_pages(size_t n);

}  // namespace fastopt::cpu
