#include "torch/large_arrays.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>  // free, posix_memalign
#include <cstring>  // memcpy
#include <mutex>
#include <utility>  // exchange
#if defined(__linux__)
#include <sys/mman.h>  // madvise
#endif

namespace fastopt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* data = nullptr;
  size_t capacity = 0;
};

// One block, so that what is kept never exceeds what was in use. The lock is only tried: a child forked while another
// thread held it goes without, forever.
class KeptBlock {
 public:
  // The kept block if it holds n bytes and not many more. Of another size, it is freed: the next ones will be, too.
  Block take(size_t n) {
    const Block block = swap({});
    if (block.capacity >= n && block.capacity / 2 <= n) return block;
    std::free(block.data);
    return {};
  }
  void keep(Block block) { std::free(swap(block).data); }

  // What was kept; or `block` itself, where the lock is taken.
  Block swap(Block block) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock.owns_lock() ? std::exchange(block_, block) : block;
  }

 private:
  std::mutex mutex_;
  Block block_;
};

// Never destroyed: tensors may be freed after it would be.
KeptBlock& kept_block() {
  static auto* kept = new KeptBlock;
  return *kept;
}

Block new_block(size_t n) {
  Block block{nullptr, (n + kHugePage - 1) / kHugePage * kHugePage};
#if defined(__linux__)
  // Not by THP_MEM_ALLOC_ENABLE, which would have to be set before torch is imported.
  if (posix_memalign(&block.data, kHugePage, block.capacity) != 0) return {};
  madvise(block.data, block.capacity, MADV_HUGEPAGE);  // a hint: without it only speed is lost
#endif
  return block;
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  kept_block().keep(*block);
  delete block;
}

struct LargeArrayAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n >= 2 * kHugePage) {
      Block block = kept_block().take(n);
      if (!block.data) block = new_block(n);
      if (block.data) return {block.data, new Block(block), &release, c10::Device(c10::kCPU)};
    }
    return c10::GetCPUAllocator()->allocate(n);
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  static LargeArrayAllocator allocator;
  constexpr c10::DispatchKeySet cpu_keys(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, cpu_keys, dtype);
}

size_t release_kept_block() {
  const Block block = kept_block().swap({});
  std::free(block.data);
  return block.capacity;
}

}  // namespace fastopt
