// Vectors of 16-bit numbers to float and back, rounded to nearest, ties to even, by the instructions of x86-64's
// levels. Compilers turn the arithmetic of common.h into vectors, too, but not into these: with it, a step of Adam
// takes four times as long in float16, and a third longer in bfloat16.
#pragma once

#include "common.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastopt::cpu {

#if defined(FASTOPT_TARGET_V3)
struct HalfV3 {
  using Stored = Half;
  static constexpr int64_t kWidth = 8;
  FASTOPT_TARGET_V3 static void widen(const Half* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  FASTOPT_TARGET_V3 static void narrow(const float* from, Half* to) {
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), kRounding));
  }
};
#endif

#if defined(FASTOPT_TARGET_V4)
// GCC 12 warns of the forms without a mask.
constexpr __mmask16 kAll = 0xffff;

struct HalfV4 {
  using Stored = Half;
  static constexpr int64_t kWidth = 16;
  FASTOPT_TARGET_V4 static void widen(const Half* from, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  FASTOPT_TARGET_V4 static void narrow(const float* from, Half* to) {
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from), kRounding));
  }
};

struct BFloat16V4 {
  using Stored = BFloat16;
  static constexpr int64_t kWidth = 32;
  FASTOPT_TARGET_V4 static __m512i widened(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bits), 16);
  }
  FASTOPT_TARGET_V4 static void widen(const BFloat16* from, float* to) {
    _mm512_storeu_si512(to, widened(from));
    _mm512_storeu_si512(to + 16, widened(from + 16));
  }
  // By 16-bit lanes: the upper halves of 32 numbers, and one more where the lower half, or the tie, says so.
  FASTOPT_TARGET_V4 static void narrow(const float* from, BFloat16* to) {
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    const __m512i lanes = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                           24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i low = _mm512_permutex2var_epi16(_mm512_castps_si512(a), lanes, _mm512_castps_si512(b));
    const __m512i high =
        _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_or_si512(lanes, one), _mm512_castps_si512(b));
    const __m512i low_or_odd = _mm512_adds_epu16(low, _mm512_and_si512(high, one));
    const __mmask32 is_up = _mm512_cmpgt_epu16_mask(low_or_odd, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    const __mmask32 is_nan =
        _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
    const __m512i rounded = _mm512_mask_add_epi16(high, is_up, high, one);
    _mm512_storeu_si512(to, _mm512_mask_mov_epi16(rounded, is_nan, _mm512_set1_epi16(0x7fc0)));
  }
};
#endif

}  // namespace fastopt::cpu
