// The scheduler: which thread of the block runs next, and where threads wait for each other.
//
// A thread starts on the fiber that runs already and keeps it when it has to wait, so that threads that never wait cost
// a function call.
#pragma once

#include <bit>
#include <cstdint>
#include <source_location>

#include "block.h"
#include "fibers.h"

namespace [[gnu::visibility("hidden")]] fastopt_shim {

// Order

inline uint64_t random_bits() {
  // xorshift64*: Vigna 2016.
  uint64_t& state = block.random_state;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dull;
}

// A set bit: the first from `from` on, cyclically, or any.
inline int choose(uint32_t bits, int from) {
  const int turn = block.shuffled ? static_cast<int>(random_bits() >> 59) : from & 31;
  return (std::countr_zero(std::rotr(bits, turn)) + turn) & 31;
}

inline Thread* thread_of_a_warp(int from) {
  const Warp& warp = block.warps[choose(block.ready_warps, from)];
  return &warp.lanes[choose(warp.ready, 0)];
}

// The thread to run next, null if all have exited. A warp runs as far as it can before another does.
inline Thread* next_thread() {
  const Warp& warp = *block.current->warp;
  if (warp.ready) return &warp.lanes[choose(warp.ready, block.current->lane + 1)];
  block.ready_warps &= ~(1u << warp.rank);
  if (block.ready_warps) return thread_of_a_warp(warp.rank + 1);
  if (!block.n_live) return nullptr;
  block.current = nullptr;
  fail("deadlock: %d threads wait for threads that never come", block.n_live);
}

inline void go_to(Thread* thread) {
  block.current = thread;
  switch_to(thread->fiber ? *thread->fiber : *take_fiber());
}

// Runs another thread; returns when the current thread is chosen again.
inline void yield_to(Thread* next) {
  Thread* self = block.current;
  if (next == self) return;
  self->fiber = running_fiber;
  go_to(next);
}

// Collectives of a warp

inline void finish_collective(Warp& warp, uint32_t lanes, const Collective& collective) {
  if (collective.fold) {
    uint64_t folded = warp.lanes[std::countr_zero(lanes)].value;
    for (uint32_t rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
      folded = collective.fold(folded, warp.lanes[std::countr_zero(rest)].value);
    }
    for (uint32_t rest = lanes; rest; rest &= rest - 1) warp.lanes[std::countr_zero(rest)].result = folded;
  } else {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      Thread& thread = warp.lanes[std::countr_zero(rest)];
      // A lane that takes no part has no defined value.
      thread.result = lanes >> thread.source & 1 ? warp.lanes[thread.source].value : ~uint64_t{0};
    }
  }
  warp.at_collective &= ~lanes;
  warp.ready |= lanes;
  block.ready_warps |= 1u << warp.rank;
}

// Completes the collective of `thread` if all lanes that its mask names have arrived.
inline bool try_collective(Warp& warp, const Thread& thread) {
  const uint32_t lanes = thread.mask & warp.live;
  if (lanes & ~warp.at_collective) return false;
  bool agree = true;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const Thread& other = warp.lanes[std::countr_zero(rest)];
    if (other.collective == thread.collective && other.mask == thread.mask) continue;
    if (other.mask >> thread.lane & 1) {
      fail("lane %d at %s, mask 0x%08x, and lane %d at %s, mask 0x%08x, wait for each other", thread.lane,
           thread.collective->name, thread.mask, other.lane, other.collective->name, other.mask);
    }
    agree = false;
  }
  if (agree) finish_collective(warp, lanes, *thread.collective);
  return agree;
}

inline uint64_t run_warp_collective(const Collective& collective, uint32_t mask, uint64_t value, int source,
                                    std::source_location where) {
  Thread& self = *block.current;
  Warp& warp = *self.warp;
  const uint32_t lane = 1u << self.lane;
  self.collective = &collective;
  self.mask = mask;
  self.source = source;
  self.value = value;
  self.where = where;
  warp.at_collective |= lane;
  if (!(mask & lane))
    fail("lane %d calls %s with mask 0x%08x, which does not name it", self.lane, collective.name, mask);
  if (mask & ~warp.live && collective.needs_all_named) {
    fail("%s with mask 0x%08x names lanes 0x%08x, which have exited or never were", collective.name, mask,
         mask & ~warp.live);
  }
  if (!try_collective(warp, self)) {
    warp.ready &= ~lane;
    yield_to(next_thread());
  } else if (block.shuffled) {
    yield_to(next_thread());
  }
  return self.result;
}

// Meetings of the block

inline void finish_barrier() {
  for (int i = 0; i < block.n_warps; ++i) {
    Warp& warp = block.warps[i];
    if (warp.at_barrier) block.ready_warps |= 1u << i;
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  block.barrier_result = block.n_true;
  block.n_at_barrier = block.n_true = 0;
}

// Waits for all threads that have not exited; returns how many of them came with a true value.
inline int run_block_collective(const Collective& collective, bool value, std::source_location where) {
  Thread& self = *block.current;
  const uint32_t lane = 1u << self.lane;
  self.collective = &collective;
  self.where = where;
  self.mask = 0;
  self.warp->at_barrier |= lane;
  if (block.n_at_barrier == 0) block.first_at_barrier = &self;
  // All must come to one place: a device may take two barriers for one, but does not promise to.
  const Thread& first = *block.first_at_barrier;
  if (first.collective != &collective || first.where.line() != where.line() || first.where.column() != where.column()) {
    fail("deadlock: threads wait at different barriers");
  }
  self.warp->ready &= ~lane;
  block.n_true += value;
  if (++block.n_at_barrier == block.n_live) {
    finish_barrier();
    // The warp that came last must not always be the first to leave.
    if (block.shuffled) yield_to(thread_of_a_warp(0));
  } else {
    yield_to(next_thread());
  }
  return block.barrier_result;
}

// Starting and ending

inline void exit_thread() {
  Thread& self = *block.current;
  Warp& warp = *self.warp;
  const uint32_t lane = 1u << self.lane;
  self.fiber = nullptr;
  warp.live &= ~lane;
  warp.ready &= ~lane;
  for (uint32_t rest = warp.at_collective; rest; rest &= rest - 1) {
    const Thread& other = warp.lanes[std::countr_zero(rest)];
    if (!(warp.at_collective >> other.lane & 1) || !(other.mask & lane)) continue;
    if (other.collective->needs_all_named) {
      fail("lane %d exits while lane %d waits for it at %s", self.lane, other.lane, other.collective->name);
    }
    try_collective(warp, other);
  }
  if (--block.n_live == block.n_at_barrier && block.n_live) finish_barrier();
}

// Ends the block and begins the next; returns its first thread, null if the grid is done.
Thread* next_block();

// Runs the current thread, then each that it may, until it must give way to one that has waited.
inline void run_threads() {
  for (;;) {
    block.body(block.context);
    exit_thread();
    Thread* next = next_thread();
    if (!next) next = next_block();
    if (next && !next->fiber) {
      block.current = next;
      continue;
    }
    idle_fibers.push_back(running_fiber);
    if (next) {
      go_to(next);
    } else {
      switch_to(host_fiber);
    }
  }
}

// Numbers the threads. What is set here holds for each block of a launch.
inline void shape_block(dim3 block_dim) {
  if (block_dim.x == block.block_dim.x && block_dim.y == block.block_dim.y && block_dim.z == block.block_dim.z) return;
  block.block_dim = block_dim;
  block.n_threads = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
  block.n_warps = (block.n_threads + kWarpSize - 1) / kWarpSize;
  uint3 index{};
  for (int rank = 0; rank < block.n_threads; ++rank) {
    Thread& thread = block.threads[rank];
    thread.index = index;
    thread.rank = rank;
    thread.lane = rank % kWarpSize;
    thread.warp = &block.warps[rank / kWarpSize];
    thread.fiber = nullptr;
    if (++index.x == block_dim.x) index.x = 0, ++index.y;
    if (index.y == block_dim.y) index.y = 0, ++index.z;
  }
  for (int i = 0; i < block.n_warps; ++i) {
    block.warps[i].lanes = &block.threads[i * kWarpSize];
    block.warps[i].rank = i;
  }
}

// Returns the thread to run first.
inline Thread* start_threads() {
  for (int i = 0; i < block.n_warps; ++i) {
    const int n_lanes = block.n_threads - i * kWarpSize;
    const uint32_t lanes = n_lanes >= kWarpSize ? ~0u : (1u << n_lanes) - 1;
    block.warps[i].live = block.warps[i].ready = lanes;
    block.warps[i].at_collective = block.warps[i].at_barrier = 0;
  }
  block.ready_warps = block.n_warps == 32 ? ~0u : (1u << block.n_warps) - 1;
  block.n_live = block.n_threads;
  block.n_at_barrier = block.n_true = 0;
  return thread_of_a_warp(0);
}

}  // namespace fastopt_shim
