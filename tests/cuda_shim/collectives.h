// Collectives: barriers, shuffles, votes and reductions of a warp; also atomics and fences.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>  // memcpy
#include <source_location>
#include <type_traits>

#include "block.h"
#include "schedule.h"

#define threadIdx (static_cast<const uint3&>(::fastopt_shim::block.current->index))
#define blockIdx (static_cast<const uint3&>(::fastopt_shim::block.index))
#define blockDim (static_cast<const dim3&>(::fastopt_shim::block.block_dim))
#define gridDim (static_cast<const dim3&>(::fastopt_shim::block.grid_dim))
#define warpSize 32

namespace [[gnu::visibility("hidden")]] fastopt_shim {

using Where = std::source_location;

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves values of up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint64_t fold_or(uint64_t a, uint64_t b) { return a | b; }
inline uint64_t fold_and(uint64_t a, uint64_t b) { return a & b; }
inline uint64_t fold_xor(uint64_t a, uint64_t b) { return a ^ b; }
inline uint64_t fold_add(uint64_t a, uint64_t b) { return a + b; }
inline uint64_t fold_min(uint64_t a, uint64_t b) { return static_cast<int64_t>(a) < static_cast<int64_t>(b) ? a : b; }
inline uint64_t fold_max(uint64_t a, uint64_t b) { return static_cast<int64_t>(a) < static_cast<int64_t>(b) ? b : a; }

inline constexpr Collective kSyncthreads{"__syncthreads", nullptr, true};
inline constexpr Collective kSyncthreadsCount{"__syncthreads_count", nullptr, true};
inline constexpr Collective kSyncthreadsAnd{"__syncthreads_and", nullptr, true};
inline constexpr Collective kSyncthreadsOr{"__syncthreads_or", nullptr, true};
inline constexpr Collective kSyncwarp{"__syncwarp", nullptr, false, false};
inline constexpr Collective kShuffle{"__shfl_sync"};
inline constexpr Collective kShuffleUp{"__shfl_up_sync"};
inline constexpr Collective kShuffleDown{"__shfl_down_sync"};
inline constexpr Collective kShuffleXor{"__shfl_xor_sync"};
inline constexpr Collective kBallot{"__ballot_sync", fold_or};
inline constexpr Collective kAny{"__any_sync", fold_or};
inline constexpr Collective kAll{"__all_sync", fold_and};
inline constexpr Collective kReduceAdd{"__reduce_add_sync", fold_add};
inline constexpr Collective kReduceMin{"__reduce_min_sync", fold_min};
inline constexpr Collective kReduceMax{"__reduce_max_sync", fold_max};
inline constexpr Collective kReduceAnd{"__reduce_and_sync", fold_and};
inline constexpr Collective kReduceOr{"__reduce_or_sync", fold_or};
inline constexpr Collective kReduceXor{"__reduce_xor_sync", fold_xor};

inline int own_lane() { return block.current->lane; }

// The first lane of a lane's segment.
inline int segment_of(int lane, int width) {
  if (width < 1 || width > kWarpSize || (width & (width - 1))) fail("the width of a shuffle is %d", width);
  return lane & ~(width - 1);
}

template <class T>
T shuffle(const Collective& collective, uint32_t mask, T value, int source, Where where) {
  return from_bits<T>(run_warp_collective(collective, mask, to_bits(value), source, where));
}

template <class T, class... Others>
concept OneOf = (std::same_as<T, Others> || ...);
template <class T>
concept Integer = OneOf<T, int, unsigned, long long, unsigned long long>;

// Atomic, since one launch runs at a time and threads are switched only where they wait.
template <class T, class F>
T replace(T* address, F&& f) {
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace fastopt_shim

// Barriers

inline void __syncthreads(fastopt_shim::Where where = fastopt_shim::Where::current()) {
  fastopt_shim::run_block_collective(fastopt_shim::kSyncthreads, false, where);
}
inline int __syncthreads_count(int predicate, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  return fastopt_shim::run_block_collective(fastopt_shim::kSyncthreadsCount, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  return fastopt_shim::run_block_collective(fastopt_shim::kSyncthreadsAnd, predicate == 0, where) == 0;
}
inline int __syncthreads_or(int predicate, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  return fastopt_shim::run_block_collective(fastopt_shim::kSyncthreadsOr, predicate != 0, where) != 0;
}
inline void __syncwarp(unsigned mask = ~0u, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  fastopt_shim::run_warp_collective(fastopt_shim::kSyncwarp, mask, 0, fastopt_shim::own_lane(), where);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// Shuffles. A lane whose source is outside its segment gets its own value.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              fastopt_shim::Where where = fastopt_shim::Where::current()) {
  const int segment = fastopt_shim::segment_of(fastopt_shim::own_lane(), width);
  return fastopt_shim::shuffle(fastopt_shim::kShuffle, mask, value, segment + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 fastopt_shim::Where where = fastopt_shim::Where::current()) {
  const int lane = fastopt_shim::own_lane(), source = lane - static_cast<int>(delta & 31);
  const bool inside = source >= fastopt_shim::segment_of(lane, width);
  return fastopt_shim::shuffle(fastopt_shim::kShuffleUp, mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   fastopt_shim::Where where = fastopt_shim::Where::current()) {
  const int lane = fastopt_shim::own_lane(), source = lane + static_cast<int>(delta & 31);
  const bool inside = source < fastopt_shim::segment_of(lane, width) + width;
  return fastopt_shim::shuffle(fastopt_shim::kShuffleDown, mask, value, inside ? source : lane, where);
}
// The xor shuffle may read earlier segments.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  fastopt_shim::Where where = fastopt_shim::Where::current()) {
  const int lane = fastopt_shim::own_lane(), source = lane ^ (lanes & 31);
  const bool inside = source < fastopt_shim::segment_of(lane, width) + width;
  return fastopt_shim::shuffle(fastopt_shim::kShuffleXor, mask, value, inside ? source : lane, where);
}

// Votes and reductions

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fastopt_shim::Where where = fastopt_shim::Where::current()) {
  const uint64_t bit = uint64_t{predicate != 0} << fastopt_shim::own_lane();
  return static_cast<unsigned>(fastopt_shim::run_warp_collective(fastopt_shim::kBallot, mask, bit, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  return static_cast<int>(fastopt_shim::run_warp_collective(fastopt_shim::kAny, mask, predicate != 0, 0, where));
}
inline int __all_sync(unsigned mask, int predicate, fastopt_shim::Where where = fastopt_shim::Where::current()) {
  return static_cast<int>(fastopt_shim::run_warp_collective(fastopt_shim::kAll, mask, predicate != 0, 0, where));
}
// Only the lane itself: a legal result, since a device guarantees no other lane.
inline unsigned __activemask() { return 1u << fastopt_shim::own_lane(); }

#define FASTOPT_SHIM_REDUCE(name, collective, ...)                                                            \
  template <class T>                                                                                          \
    requires fastopt_shim::OneOf<T, __VA_ARGS__>                                                              \
  T name(unsigned mask, T value, fastopt_shim::Where where = fastopt_shim::Where::current()) {                \
    const auto wide = static_cast<uint64_t>(static_cast<int64_t>(value));                                     \
    return static_cast<T>(fastopt_shim::run_warp_collective(fastopt_shim::collective, mask, wide, 0, where)); \
  }
FASTOPT_SHIM_REDUCE(__reduce_add_sync, kReduceAdd, int, unsigned)
FASTOPT_SHIM_REDUCE(__reduce_min_sync, kReduceMin, int, unsigned)
FASTOPT_SHIM_REDUCE(__reduce_max_sync, kReduceMax, int, unsigned)
FASTOPT_SHIM_REDUCE(__reduce_and_sync, kReduceAnd, unsigned)
FASTOPT_SHIM_REDUCE(__reduce_or_sync, kReduceOr, unsigned)
FASTOPT_SHIM_REDUCE(__reduce_xor_sync, kReduceXor, unsigned)
#undef FASTOPT_SHIM_REDUCE

// Atomics, on the types that a device takes: int64_t, a long, is not among them.

#define FASTOPT_SHIM_ATOMIC(name, expression, ...)                                 \
  template <class T>                                                               \
    requires(__VA_ARGS__)                                                          \
  T name(T* address, std::type_identity_t<T> value) {                              \
    return fastopt_shim::replace(address, [=](T old) -> T { return expression; }); \
  }
FASTOPT_SHIM_ATOMIC(atomicAdd, old + value, fastopt_shim::OneOf<T, int, unsigned, unsigned long long, float, double>)
FASTOPT_SHIM_ATOMIC(atomicSub, old - value, fastopt_shim::OneOf<T, int, unsigned>)
FASTOPT_SHIM_ATOMIC(atomicExch, (static_cast<void>(old), value),
                    fastopt_shim::OneOf<T, int, unsigned, unsigned long long, float>)
FASTOPT_SHIM_ATOMIC(atomicMin, value < old ? value : old, fastopt_shim::Integer<T>)
FASTOPT_SHIM_ATOMIC(atomicMax, old < value ? value : old, fastopt_shim::Integer<T>)
FASTOPT_SHIM_ATOMIC(atomicAnd, old& value, fastopt_shim::OneOf<T, int, unsigned, unsigned long long>)
FASTOPT_SHIM_ATOMIC(atomicOr, old | value, fastopt_shim::OneOf<T, int, unsigned, unsigned long long>)
FASTOPT_SHIM_ATOMIC(atomicXor, old ^ value, fastopt_shim::OneOf<T, int, unsigned, unsigned long long>)
FASTOPT_SHIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1, std::same_as<T, unsigned>)
FASTOPT_SHIM_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1, std::same_as<T, unsigned>)
#undef FASTOPT_SHIM_ATOMIC

template <class T>
  requires fastopt_shim::OneOf<T, int, unsigned, unsigned short, unsigned long long>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return fastopt_shim::replace(address, [=](T old) { return old == compare ? value : old; });
}
