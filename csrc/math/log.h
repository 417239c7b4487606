// Natural logarithm as plain arithmetic that any compiler vectorises.
#pragma once

#include "common.h"

namespace fastopt {

// log x for finite x >= 1; within 2^-40 of it.
//
// x = 2^n m, sqrt(1/2) <= m < sqrt(2), and log m = 2 atanh r, r = (m - 1) / (m + 1), by its series to r^15.
FASTOPT_HD double log_from_one(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t n = (bits - 0x3fe6a09e667f3bcdull) >> 52;
  const double m = bit_cast<double>(bits - (n << 52));
  const double exponent = bit_cast<double>(n | 0x4330000000000000ull) - 0x1p52;
  const double r = (m - 1.0) / (m + 1.0);
  const double square = r * r;
  double series = 2.0 / 15;
  series = series * square + 2.0 / 13;
  series = series * square + 2.0 / 11;
  series = series * square + 2.0 / 9;
  series = series * square + 2.0 / 7;
  series = series * square + 2.0 / 5;
  series = series * square + 2.0 / 3;
  return exponent * 0.6931471805599453 + (2.0 * r + r * square * series);
}

}  // namespace fastopt
