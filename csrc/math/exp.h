// exp of non-positive numbers, as plain arithmetic that any compiler vectorises.
#pragma once

#include "common.h"

namespace fastopt {

// e^x for x in [-inf, 0] or NaN; within 1.1 units in the last place; results below the smallest normal number are 0.
//
// x = n log 2 + r, |r| <= log(2) / 2, so e^x = 2^n e^r. Adding 1.5 * 2^(mantissa bits) rounds x / log 2 to the integer
// n and leaves n in the low bits. log 2 is split so that n times its first part is exact (Cody & Waite, 1980). e^r is
// 1 + r + r^2 q(r) with q interpolated at the Chebyshev nodes; its relative error is 1.0e-8 and 1.7e-17.
FASTOPT_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);  // CUDA's own: 1 unit in the last place, in fewer instructions
#else
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 1.3926213e-3f;
  q = q * r + 8.3632031e-3f;
  q = q * r + 4.1666556e-2f;
  q = q * r + 1.6666577e-1f;
  q = q * r + 0.5f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  // A product, not an addition to the exponent bits, so that a NaN stays a NaN.
  const float result = (r * r * q + r) * power + power;
  return x < -87.33654f ? 0.0f : result;
#endif
}

FASTOPT_HD double exp_nonpositive(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double q = 0x1.af38d53857513p-26;
  q = q * r + 0x1.2891a8c1d838dp-22;
  q = q * r + 0x1.71de0d9c145d0p-19;
  q = q * r + 0x1.a019b8ef67c6cp-16;
  q = q * r + 0x1.a01a01a7c8d47p-13;
  q = q * r + 0x1.6c16c17893833p-10;
  q = q * r + 0x1.11111111109adp-7;
  q = q * r + 0x1.5555555553d4fp-5;
  q = q * r + 0x1.5555555555556p-3;
  q = q * r + 0.5;
  const double power = bit_cast<double>((bit_cast<uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);
  const double result = (r * r * q + r) * power + power;
  return x < -708.3964185322641 ? 0.0 : result;
#endif
}

// The same for logits of 16 bits, whose gradient is rounded to 2^-9 or 2^-12 in any case: a GPU has an instruction for
// 2^x, within 2^-22; the error of x log2(e) adds |x| 2^-24.
FASTOPT_HD float exp_nonpositive_coarse(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return exp_nonpositive(x);
#endif
}

}  // namespace fastopt
