// Memory in huge pages where there are, for the faults of small ones cost more than the arithmetic on what is in them.
#pragma once

#include <cstddef>

namespace fastopt::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// At least n bytes from the begin of a cache line on, or of a huge page if n is that large; n becomes what they are.
// Freed by std::free; null if there is no memory.
void* allocate_pages(size_t& n);

}  // namespace fastopt::cpu
