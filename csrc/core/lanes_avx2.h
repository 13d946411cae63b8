// Sixteen lanes of float32 in two registers, AVX2 + FMA.
#pragma once

#include <immintrin.h>

#include "core/exp2.h"

namespace ranvier {
namespace {

struct Floats {
  __m256 a, b;
};

RANVIER_INLINE __m256i sign_of(std::uint32_t lanes) {
  const __m256i one_each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), one_each), one_each);
}

struct FloatLanes {
  using F = Floats;

  static RANVIER_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static RANVIER_INLINE F load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static RANVIER_INLINE void store(float* to, F x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
  }
  static RANVIER_INLINE F load_some(const float* x, std::uint32_t lanes) {
    return {_mm256_maskload_ps(x, sign_of(lanes)), _mm256_maskload_ps(x + 8, sign_of(lanes >> 8))};
  }
  static RANVIER_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static RANVIER_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static RANVIER_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static RANVIER_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static RANVIER_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static RANVIER_INLINE F rint(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static RANVIER_INLINE F choose(std::uint32_t lanes, F x, F y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(sign_of(lanes))),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(sign_of(lanes >> 8)))};
  }
  static RANVIER_INLINE F keep(std::uint32_t lanes, F x) { return choose(lanes, x, set(0.0f)); }
  static RANVIER_INLINE std::uint32_t lanes_of_signs(__m256 a, __m256 b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(a)) | static_cast<std::uint32_t>(_mm256_movemask_ps(b)) << 8;
  }
  static RANVIER_INLINE std::uint32_t at_least(F x, float y) {
    const __m256 bound = _mm256_set1_ps(y);
    return lanes_of_signs(_mm256_cmp_ps(x.a, bound, _CMP_GE_OQ), _mm256_cmp_ps(x.b, bound, _CMP_GE_OQ));
  }
  static RANVIER_INLINE std::uint32_t below_inf(F x) {
    const __m256 inf = _mm256_set1_ps(__builtin_inff());
    return lanes_of_signs(_mm256_cmp_ps(x.a, inf, _CMP_LT_OQ), _mm256_cmp_ps(x.b, inf, _CMP_LT_OQ));
  }
  static RANVIER_INLINE __m256 shifted(__m256 x, __m256 r) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(r), 23)));
  }
  static RANVIER_INLINE F shift_exponent(F x, F r) { return {shifted(x.a, r.a), shifted(x.b, r.b)}; }
  static RANVIER_INLINE float largest(F x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static RANVIER_INLINE float total(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace
}  // namespace ranvier
