// Fibers: stacks kept for reuse, and the switch from one to another. schedule.h decides what runs on them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>  // perror
#include <cstdlib>
#include <memory>
#include <utility>  // move
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTOPT_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTOPT_SHIM_ASAN 1
#endif
#endif

#if defined(FASTOPT_SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !(defined(__x86_64__) || defined(__aarch64__)) || !defined(__ELF__)
#define FASTOPT_SHIM_UCONTEXT 1
#endif
#if defined(FASTOPT_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#if !defined(FASTOPT_SHIM_UCONTEXT)
// fastopt_shim_switch(void** from, void* to): saves the registers that a call preserves, then the stack pointer in
// *from; takes both from `to`. Each object file brings it, the linker keeps one.
__asm__(
    ".pushsection .text.fastopt_shim_switch,\"axG\",%progbits,fastopt_shim_switch,comdat\n"
    ".weak fastopt_shim_switch\n"
    ".hidden fastopt_shim_switch\n"
    ".type fastopt_shim_switch, %function\n"
    ".balign 16\n"
    "fastopt_shim_switch:\n"
#if defined(__x86_64__)
    "  push %rbp\n"
    "  push %rbx\n"
    "  push %r12\n"
    "  push %r13\n"
    "  push %r14\n"
    "  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n"
    "  pop %r14\n"
    "  pop %r13\n"
    "  pop %r12\n"
    "  pop %rbx\n"
    "  pop %rbp\n"
    "  ret\n"
#else
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n"
#endif
    ".size fastopt_shim_switch, .-fastopt_shim_switch\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) void fastopt_shim_switch(void** from, void* to);
#endif

namespace [[gnu::visibility("hidden")]] fastopt_shim {

#if defined(FASTOPT_SHIM_ASAN)
inline constexpr size_t kStackBytes = size_t{512} << 10;
#else
inline constexpr size_t kStackBytes = size_t{256} << 10;
#endif

struct Fiber {
  char* stack = nullptr;
  size_t stack_bytes = 0;
#if defined(FASTOPT_SHIM_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(FASTOPT_SHIM_ASAN)
  void* fake_stack = nullptr;
#endif
};

// The fiber of the launching host thread, the running fiber, and idle ones.
inline Fiber host_fiber;
inline Fiber* running_fiber = &host_fiber;
inline std::vector<Fiber*> idle_fibers;
inline std::vector<std::unique_ptr<Fiber>> all_fibers;

#if defined(FASTOPT_SHIM_ASAN)
// AddressSanitizer must know which stack is in use. It returns the bounds of the previous stack, needed for the host's.
inline Fiber* left_fiber = nullptr;
inline void leave_stack(Fiber& from, const Fiber& to) {
  left_fiber = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
}
inline void enter_stack(void* fake_stack) {
  const void* left_stack;
  __sanitizer_finish_switch_fiber(fake_stack, &left_stack, &left_fiber->stack_bytes);
  left_fiber->stack = static_cast<char*>(const_cast<void*>(left_stack));
}
#endif

inline void switch_to(Fiber& to) {
  Fiber& from = *running_fiber;
  running_fiber = &to;
#if defined(FASTOPT_SHIM_ASAN)
  leave_stack(from, to);
#endif
#if defined(FASTOPT_SHIM_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  fastopt_shim_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(FASTOPT_SHIM_ASAN)
  enter_stack(from.fake_stack);
#endif
}

// The one function that all fibers run; it does not return.
void run_threads();

inline void start_fiber() {
#if defined(FASTOPT_SHIM_ASAN)
  enter_stack(nullptr);
#endif
  run_threads();
}

// Makes the first switch to the fiber call start_fiber.
inline void prepare_fiber(Fiber& fiber) {
#if defined(FASTOPT_SHIM_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
#else
  // Tops of stacks differ in their low bits, or all fibers would share a few sets of the cache.
  const size_t stagger = all_fibers.size() % 32 * 320;
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - stagger);
#if defined(__x86_64__)
  // Six registers, the function to start, and a return address of zero, which ends backtraces.
  void** saved = top - 8;
  saved[6] = reinterpret_cast<void*>(start_fiber);
#else
  void** saved = top - 20;
  saved[11] = reinterpret_cast<void*>(start_fiber);  // x30
#endif
  fiber.stack_pointer = saved;
#endif
}

inline Fiber* new_fiber() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The lowest page is a guard page: a stack overflow must not reach another stack.
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    perror("cuda shim: no memory for a fiber's stack");
    abort();
  }
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = static_cast<char*>(memory) + page;
  fiber->stack_bytes = kStackBytes;
  prepare_fiber(*fiber);
  all_fibers.push_back(std::move(fiber));
  return all_fibers.back().get();
}

inline Fiber* take_fiber() {
  if (idle_fibers.empty()) return new_fiber();
  Fiber* fiber = idle_fibers.back();
  idle_fibers.pop_back();
  return fiber;
}

}  // namespace fastopt_shim
