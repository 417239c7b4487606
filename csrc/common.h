// Shared by every source: the host-device marker, fixed inlining, stored types and their conversions.
#pragma once

#include <cstdint>
#include <cstring>  // memcpy

#if defined(__CUDACC__)
#define FASTOPT_HD __host__ __device__ __forceinline__
#else
// A rule must be inlined into the loop that is compiled for each instruction set, or it would run as baseline code.
#define FASTOPT_HD inline __attribute__((always_inline))
#endif

namespace fastopt {

constexpr int64_t kLineBytes = 64;  // of a cache line

// Fetches the lines of an object, or of what was one: it may be gone, or null. The statement without instructions keeps
// calls: GCC removes those of functions that do nothing but fetch.
inline void fetch(const void* object, int64_t n_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(object);
  for (int64_t i = 0; i < n_bytes; i += kLineBytes) __builtin_prefetch(reinterpret_cast<const void*>(begin + i));
  __builtin_prefetch(reinterpret_cast<const void*>(begin + n_bytes - 1));
  asm volatile("");
}

FASTOPT_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Stored 16-bit types. They only hold bits: every rule and loss computes in float or double.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// The type in which a stored type is computed.
template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using compute_t = typename ComputeType<S>::type;

template <class To, class From>
FASTOPT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FASTOPT_HD double load(double value) { return value; }
FASTOPT_HD float load(float value) { return value; }
FASTOPT_HD float load(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// Without branches, so that it vectorises: the exponent is rebased by a multiplication, subnormals by a subtraction.
FASTOPT_HD float load(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#elif defined(__aarch64__)
  return static_cast<float>(bit_cast<__fp16>(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const float normal = bit_cast<float>((magnitude << 13) + (224u << 23)) * 0x1p-112f;
  const float subnormal = bit_cast<float>(magnitude | (126u << 23)) - 0.5f;
  const float absolute = magnitude < 0x0400u ? subnormal : normal;
  return bit_cast<float>(bit_cast<uint32_t>(absolute) | sign);
#endif
}

FASTOPT_HD void store(double& to, double value) { to = value; }
FASTOPT_HD void store(float& to, float value) { to = value; }

// Round to nearest, ties to even; a NaN stays a NaN.
FASTOPT_HD void store(BFloat16& to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

// Round to nearest, ties to even: adding a power of two that aligns the last kept bit lets the addition round.
FASTOPT_HD void store(Half& to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#elif defined(__aarch64__)
  to.bits = bit_cast<uint16_t>(static_cast<__fp16>(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 dropped bits in integers; overflow carries into infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: 0.5 has its last bit at 2^-24, the step of half's subnormals.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(sign | half);
#endif
}

// decay * average + (1 - decay) * value, rounded relative to the larger of the two weights, as torch.lerp is.
template <class T>
FASTOPT_HD T moving_average(T average, T value, T decay, T one_minus_decay) {
  // Selected before the arithmetic: two numbers that are the same for all elements, and one product.
  const bool is_slow = one_minus_decay < T(0.5);
  const T difference = value - average;
  return (is_slow ? average : value) + (is_slow ? one_minus_decay : -decay) * difference;
}

// The larger of two numbers, NaN if one of them is not a number, as torch.maximum.
template <class T>
FASTOPT_HD T larger_or_nan(T a, T b) {
  const T larger = a > b ? a : b;
  return a != a ? a : larger;
}

// Calls f with an empty value of the stored type that a DType names.
template <class F>
auto with_stored_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Half{});
    default: return f(float{});
  }
}

// Calls f with std::true_type's and std::false_type's equivalent, so that a flag becomes a type.
template <bool kValue>
struct BoolConstant {
  static constexpr bool value = kValue;
};
template <class F>
auto with_bool(bool value, F&& f) {
  return value ? f(BoolConstant<true>{}) : f(BoolConstant<false>{});
}

}  // namespace fastopt
