// Natural logarithm as plain arithmetic that any compiler vectorises.
#pragma once

#include "common.h"

namespace fastopt {

// log x for finite x >= 1; within 1 unit of the last place of it.
//
// x = 2^n m, sqrt(1/2) <= m < sqrt(2). With f = m - 1 and s = f / (2 + f), log m = log (1 + s) / (1 - s) = 2 s + s R,
// R = s^2 P(s^2) within 2^-58 for the polynomial P that is closest to it; and since 2 s = f - s f,
// log m = f - (f^2 / 2 - s (f^2 / 2 + R)), whose leading term f is exact. The first of log 2's two parts times n is
// exact.
FASTOPT_HD double log_from_one(double x) {
  constexpr double kLog2High = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t n = (bits - 0x3fe6a09e667f3bcdull) >> 52;
  const double f = bit_cast<double>(bits - (n << 52)) - 1.0;
  const double exponent = bit_cast<double>(n | 0x4330000000000000ull) - 0x1p52;
  const double s = f / (2.0 + f);
  const double square = s * s;
  double p = 0x1.2f0563862e5fdp-3;
  p = p * square + 0x1.39a1bab73fcacp-3;
  p = p * square + 0x1.74663ee86e841p-3;
  p = p * square + 0x1.c71c52095d16fp-3;
  p = p * square + 0x1.24924941f124fp-2;
  p = p * square + 0x1.999999997fdb7p-2;
  p = p * square + 0x1.5555555555592p-1;
  const double half = 0.5 * f * f;
  const double correction = half - (s * (half + square * p) + exponent * kLog2Low);
  return exponent * kLog2High - (correction - f);
}

}  // namespace fastopt
