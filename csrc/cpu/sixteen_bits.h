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

// Widened numbers lie in another order, which narrow undoes: of 32 first those of even places, then of odd ones.
struct BFloat16V4 {
  using Stored = BFloat16;
  static constexpr int64_t kWidth = 32;
  FASTOPT_TARGET_V4 static void widen(const BFloat16* from, float* to) {
    const __m512i pairs = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_maskz_slli_epi32(kAll, pairs, 16));
    _mm512_storeu_si512(to + 16, _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
  }
  FASTOPT_TARGET_V4 static void narrow(const float* from, BFloat16* to) {
    const __m512i even = _mm512_maskz_srli_epi32(kAll, rounded(from), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(from + 16)));
  }

 private:
  // In the upper halves. What is not a number has a lower half of 0, as arithmetic makes it of 16-bit numbers, so that
  // nothing is carried into its upper half.
  FASTOPT_TARGET_V4 static __m512i rounded(const float* from) {
    const __m512i bits = _mm512_loadu_si512(from), one = _mm512_set1_epi32(1);
    const __m512i less_than_half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(less_than_half, is_odd, less_than_half, one);
  }
};
#endif

}  // namespace fastopt::cpu
