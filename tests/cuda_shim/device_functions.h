// Functions of a single thread: cached loads and stores, arithmetic with a given rounding, bits, traps.
#pragma once

#include <math.h>  // sqrt(float) and its like without std::, as device code calls them

#include <bit>
#include <cassert>
#include <cstdint>
#include <cstdio>   // printf
#include <cstring>  // memcpy
#include <type_traits>

#include "block.h"

// Loads and stores with a cache hint

#define FASTOPT_SHIM_LOAD(name) \
  template <class T>            \
  T name(const T* address) {    \
    return *address;            \
  }
FASTOPT_SHIM_LOAD(__ldg)
FASTOPT_SHIM_LOAD(__ldca)
FASTOPT_SHIM_LOAD(__ldcg)
FASTOPT_SHIM_LOAD(__ldcs)
FASTOPT_SHIM_LOAD(__ldlu)
FASTOPT_SHIM_LOAD(__ldcv)
#undef FASTOPT_SHIM_LOAD

#define FASTOPT_SHIM_STORE(name)                         \
  template <class T>                                     \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
FASTOPT_SHIM_STORE(__stwb)
FASTOPT_SHIM_STORE(__stcg)
FASTOPT_SHIM_STORE(__stcs)
FASTOPT_SHIM_STORE(__stwt)
#undef FASTOPT_SHIM_STORE

// Arithmetic that is rounded separately, never fused

#define FASTOPT_SHIM_ROUNDED(T, name, parameters, expression) \
  inline T name parameters {                                  \
    const volatile T rounded = expression;                    \
    return rounded;                                           \
  }
FASTOPT_SHIM_ROUNDED(float, __fadd_rn, (float a, float b), a + b)
FASTOPT_SHIM_ROUNDED(float, __fsub_rn, (float a, float b), a - b)
FASTOPT_SHIM_ROUNDED(float, __fmul_rn, (float a, float b), a* b)
FASTOPT_SHIM_ROUNDED(float, __fdiv_rn, (float a, float b), a / b)
FASTOPT_SHIM_ROUNDED(float, __frcp_rn, (float a), 1.0f / a)
FASTOPT_SHIM_ROUNDED(float, __fsqrt_rn, (float a), sqrtf(a))
FASTOPT_SHIM_ROUNDED(float, __fmaf_rn, (float a, float b, float c), fmaf(a, b, c))
FASTOPT_SHIM_ROUNDED(double, __dadd_rn, (double a, double b), a + b)
FASTOPT_SHIM_ROUNDED(double, __dsub_rn, (double a, double b), a - b)
FASTOPT_SHIM_ROUNDED(double, __dmul_rn, (double a, double b), a* b)
FASTOPT_SHIM_ROUNDED(double, __ddiv_rn, (double a, double b), a / b)
FASTOPT_SHIM_ROUNDED(double, __drcp_rn, (double a), 1.0 / a)
FASTOPT_SHIM_ROUNDED(double, __dsqrt_rn, (double a), sqrt(a))
FASTOPT_SHIM_ROUNDED(double, __fma_rn, (double a, double b, double c), fma(a, b, c))
#undef FASTOPT_SHIM_ROUNDED

// Functions that <math.h> lacks. The fast ones are as exact as the slow ones here, and less so on a device.

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

// Bits

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

[[noreturn]] inline void __trap() { fastopt_shim::fail("__trap()"); }
