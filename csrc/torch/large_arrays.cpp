#include "torch/large_arrays.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>  // free
#include <cstring>  // memcpy
#include <mutex>
#include <utility>  // exchange

#include "cpu/pages.h"
#include "torch/context.h"

namespace fastopt {
namespace {

struct Block {
  void* data = nullptr;
  size_t capacity = 0;  // bytes
};

// Keeps one block, so that kept memory never exceeds the memory that was in use. The lock is only tried: a child that
// was forked while another thread held it never gets it.
class KeptBlock {
 public:
  // The kept block if it holds n bytes and not over twice as many. Otherwise it is freed: the size in use has changed.
  Block take(size_t n) {
    const Block block = swap({});
    if (block.capacity >= n && block.capacity / 2 <= n) return block;
    std::free(block.data);
    return {};
  }
  void keep(Block block) { std::free(swap(block).data); }

  // Keeps `block` and returns the block kept before; returns `block` itself if another thread holds the lock.
  Block swap(Block block) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock.owns_lock() ? std::exchange(block_, block) : block;
  }

 private:
  std::mutex mutex_;
  Block block_;
};

// Never destroyed: tensors may be freed later than static objects.
KeptBlock& kept_block() {
  static auto* kept = new KeptBlock;
  return *kept;
}

Block new_block(size_t n) {
  const size_t capacity = cpu::rounded_to_pages(n);
  void* const data = cpu::allocate_pages(capacity);
  return data ? Block{data, capacity} : Block{};
}

void release_block(void* context) {
  auto* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  kept_block().keep(*block);
  delete block;
}

struct CpuAllocator : c10::Allocator {
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

// Allocates gradients.
struct BlockAllocator final : CpuAllocator {
  c10::DataPtr allocate(size_t n) override {
    if (n >= 2 * cpu::kHugePage) {
      Block block = kept_block().take(n);
      if (!block.data) block = new_block(n);
      if (block.data) {
        c10::profiledCPUMemoryReporter().New(block.data, n);  // as torch's own allocator does
        return {block.data, new Block(block), &release_block, c10::Device(c10::kCPU)};
      }
    }
    return c10::GetCPUAllocator()->allocate(n);
  }
};

void release_pages(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  std::free(data);
}

// Allocates states, which are long-lived: no block is larger than needed or kept. The rest of the last page may be
// unusable for others, so it is at most an eighth of the state.
struct PageAllocator final : CpuAllocator {
  c10::DataPtr allocate(size_t n) override {
    const bool fills_pages = n >= cpu::kHugePage && cpu::rounded_to_pages(n) - n <= n / 8;
    void* const data = fills_pages ? cpu::allocate_pages(n) : nullptr;
    if (!data) return c10::GetCPUAllocator()->allocate(n);
    c10::profiledCPUMemoryReporter().New(data, n);
    return {data, data, &release_pages, c10::Device(c10::kCPU)};
  }
};

at::Tensor empty_of(c10::Allocator& allocator, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet cpu_keys(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, cpu_keys, dtype);
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  static BlockAllocator allocator;
  return empty_of(allocator, sizes, strides, dtype);
}

at::Tensor empty_state(const at::Tensor& param) {
  static PageAllocator allocator;
  if (!is_plain_cpu(param) || !param.is_non_overlapping_and_dense()) return at::empty_like(param);
  return empty_of(allocator, param.sizes(), param.strides(), param.scalar_type());
}

at::Tensor zero_state(const at::Tensor& param) {
  at::AutoDispatchBelowADInplaceOrView guard;  // a fresh tensor has version 0
  return empty_state(param).zero_();
}

size_t release_kept_block() {
  const Block block = kept_block().swap({});
  std::free(block.data);
  return block.capacity;
}

}  // namespace fastopt
