#include "torch/huge_pages.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>  // free, posix_memalign
#include <cstring>  // memcpy
#if defined(__linux__)
#include <sys/mman.h>  // madvise
#endif

namespace fastopt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct HugePageAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
#if defined(__linux__)
    // Not by THP_MEM_ALLOC_ENABLE, which would have to be set before torch is imported.
    if (n >= 2 * kHugePage) {
      void* data = nullptr;
      if (posix_memalign(&data, kHugePage, n) == 0) {
        madvise(data, n / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: without it only speed is lost
        return {data, data, &std::free, c10::Device(c10::kCPU)};
      }
    }
#endif
    return c10::GetCPUAllocator()->allocate(n);
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

}  // namespace

at::Tensor empty_on_huge_pages(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  static HugePageAllocator allocator;
  constexpr c10::DispatchKeySet cpu_keys(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, cpu_keys, dtype);
}

}  // namespace fastopt
