#include "cpu/pages.h"

#include <cstdlib>  // posix_memalign
#if defined(__linux__)
#include <sys/mman.h>  // madvise
#endif

namespace fastopt::cpu {

void* allocate_pages(size_t& n) {
  constexpr size_t kLine = 64;
  const size_t unit = n >= kHugePage ? kHugePage : kLine;
  n = (n + unit - 1) / unit * unit;
  void* data = nullptr;
  if (posix_memalign(&data, unit, n) != 0) return nullptr;
#if defined(__linux__)
  // Not by THP_MEM_ALLOC_ENABLE, which would have to be set before torch is imported.
  if (unit == kHugePage) madvise(data, n, MADV_HUGEPAGE);  // a hint: without it only speed is lost
#endif
  return data;
}

}  // namespace fastopt::cpu
