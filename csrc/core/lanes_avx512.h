// Sixteen lanes of float32 in one register, AVX-512 (F, DQ).
#pragma once

#include <immintrin.h>

#include "core/exp2.h"

namespace ranvier {
namespace {

struct FloatLanes {
  using F = __m512;

  static RANVIER_INLINE F set(float a) { return _mm512_set1_ps(a); }
  static RANVIER_INLINE F load(const float* a) { return _mm512_loadu_ps(a); }
  static RANVIER_INLINE void store(float* to, F a) { _mm512_storeu_ps(to, a); }
  static RANVIER_INLINE F load_some(const float* a, std::uint32_t lanes) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), a);
  }
  static RANVIER_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static RANVIER_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static RANVIER_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static RANVIER_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static RANVIER_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static RANVIER_INLINE F rint(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static RANVIER_INLINE F choose(std::uint32_t lanes, F a, F b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(lanes), b, a);
  }
  static RANVIER_INLINE F keep(std::uint32_t lanes, F a) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), a); }
  static RANVIER_INLINE std::uint32_t at_least(F a, float b) { return _mm512_cmp_ps_mask(a, _mm512_set1_ps(b), _CMP_GE_OQ); }
  static RANVIER_INLINE std::uint32_t below_inf(F a) {
    return _mm512_cmp_ps_mask(a, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  }
  static RANVIER_INLINE F shift_exponent(F a, F r) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(r), 23)));
  }
  static RANVIER_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
  static RANVIER_INLINE float total(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace
}  // namespace ranvier
