// CUDA's words of declaration, its vector types, and dim3.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define FASTOPT_SHIM_VECTORS(T, name, bytes)                                   \
  struct __align__(2 * bytes) name##2 { T x, y; };                             \
  struct name##3 { T x, y, z; };                                               \
  struct __align__(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }        \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

FASTOPT_SHIM_VECTORS(unsigned char, uchar, 1)
FASTOPT_SHIM_VECTORS(short, short, 2)
FASTOPT_SHIM_VECTORS(unsigned short, ushort, 2)
FASTOPT_SHIM_VECTORS(int, int, 4)
FASTOPT_SHIM_VECTORS(unsigned, uint, 4)
FASTOPT_SHIM_VECTORS(long long, longlong, 8)
FASTOPT_SHIM_VECTORS(unsigned long long, ulonglong, 8)
FASTOPT_SHIM_VECTORS(float, float, 4)
FASTOPT_SHIM_VECTORS(double, double, 8)
#undef FASTOPT_SHIM_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
