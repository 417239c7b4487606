#include "cpu/scratch.h"

#include <cstdlib>  // free
#include <new>      // bad_alloc

#include "cpu/pages.h"

namespace fastopt::cpu {
namespace {

struct Slot {
  void* data = nullptr;
  size_t capacity = 0;

  void release() {
    std::free(data);
    data = nullptr;
    capacity = 0;
  }
};

struct Slots {
  Slot all[kScratchSlots];
  ~Slots() {
    for (Slot& slot : all) slot.release();
  }
};

thread_local Slots slots;

}  // namespace

void* scratch_bytes(size_t n, int i) {
  Slot& slot = slots.all[i];
  if (slot.capacity < n) {
    slot.release();
    n = rounded_to_pages(n);
    slot.data = allocate_pages(n);
    if (!slot.data) throw std::bad_alloc();
    slot.capacity = n;
  }
  return slot.data;
}

void release_large_scratch() {
  for (Slot& slot : slots.all) {
    if (slot.capacity > kMaxKeptScratch) slot.release();
  }
}

}  // namespace fastopt::cpu
