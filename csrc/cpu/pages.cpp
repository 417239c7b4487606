#include "cpu/pages.h"

#include <cstdlib>  // posix_memalign
#if defined(__linux__)
#include <sys/mman.h>  // madvise
#endif

namespace fastopt::cpu {

void* allocate_pages(size_t n) {
  void* data = nullptr;
  if (posix_memalign(&data, alignment_of(n), n) != 0) return nullptr;
#if defined(__linux__)
  // Not by THP_MEM_ALLOC_ENABLE, which would have to be set before torch is imported.
  if (n >= kHugePage) madvise(data, n / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: else only speed is lost
#endif
  return data;
}

}  // namespace fastopt::cpu
