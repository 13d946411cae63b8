// Loads and stores of the three float types by sixteen lanes, AVX-512 (F, BW, DQ, VL). Lanes outside the mask are zero and
// not touched in memory.
#pragma once

#include <immintrin.h>

#include "core/numeric.h"

namespace ranvier {
namespace {

RANVIER_INLINE __mmask16 lanes_from(std::int64_t k, std::int64_t K) {
  return K - k >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (K - k)) - 1u);
}

RANVIER_INLINE __m512 bf16_lanes(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <DType D>
RANVIER_INLINE __m512 load_lanes(const void* x, std::int64_t k, __mmask16 lanes) {
  if constexpr (D == DType::float32) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + k);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const std::uint16_t*>(x) + k);
    return D == DType::float16 ? _mm512_cvtph_ps(half) : bf16_lanes(half);
  }
}

// To the 16-bit type, to nearest even, NaN quiet; bfloat16 by integers, because vcvtneps2bf16 belongs to another level.
template <DType D>
RANVIER_INLINE __m256i narrow(__m512 v) {
  if constexpr (D == DType::float16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet));
}

// The value as the type holds it.
template <DType D>
RANVIER_INLINE __m512 rounded_to(__m512 v) {
  if constexpr (D == DType::float32) return v;
  if constexpr (D == DType::float16) return _mm512_cvtph_ps(narrow<D>(v));
  return bf16_lanes(narrow<D>(v));
}

template <DType D>
RANVIER_INLINE void store_lanes(void* y, std::int64_t k, __mmask16 lanes, __m512 v) {
  if constexpr (D == DType::float32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + k, lanes, v);
  } else {
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(y) + k, lanes, narrow<D>(v));
  }
}

}  // namespace
}  // namespace ranvier
