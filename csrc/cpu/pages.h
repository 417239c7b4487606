// Memory in huge pages where there are, for the faults of small ones cost more than the arithmetic on what is in them.
#pragma once

#include <cstddef>

#include "common.h"

namespace fastopt::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// What n bytes begin at a multiple of: a huge page if they are that many, else a cache line.
constexpr size_t page_of(size_t n) { return n >= kHugePage ? kHugePage : size_t{kLineBytes}; }

// n bytes and what is left of their last page.
inline size_t in_whole_pages(size_t n) {
  return static_cast<size_t>(divide_up(static_cast<int64_t>(n), static_cast<int64_t>(page_of(n)))) * page_of(n);
}

// n bytes; the huge pages that they fill are asked for. Freed by std::free; null if there is no memory.
void* allocate_pages(size_t n);

}  // namespace fastopt::cpu
