// Loads and stores of the three float types by eight lanes, AVX2 + F16C. `count` lanes are read or written, the others zero.
#pragma once

#include <immintrin.h>

#include "core/numeric.h"

namespace ranvier {
namespace {

RANVIER_INLINE __m256 bf16_lanes(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <DType D>
RANVIER_INLINE __m256 load_lanes(const void* x, std::int64_t k, std::int64_t count) {
  constexpr std::int64_t size = D == DType::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(x) + k * size;
  alignas(32) char part[32] = {0};
  if (count < 8) {
    for (std::int64_t i = 0; i < count * size; ++i) part[i] = from[i];
    from = part;
  }
  if constexpr (D == DType::float32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return D == DType::float16 ? _mm256_cvtph_ps(half) : bf16_lanes(half);
  }
}

// To the 16-bit type, to nearest even, NaN quiet.
template <DType D>
RANVIER_INLINE __m128i narrow(__m256 v) {
  if constexpr (D == DType::float16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}

// The value as the type holds it.
template <DType D>
RANVIER_INLINE __m256 rounded_to(__m256 v) {
  if constexpr (D == DType::float32) return v;
  if constexpr (D == DType::float16) return _mm256_cvtph_ps(narrow<D>(v));
  return bf16_lanes(narrow<D>(v));
}

template <DType D>
RANVIER_INLINE void store_lanes(void* y, std::int64_t k, std::int64_t count, __m256 v) {
  constexpr std::int64_t size = D == DType::float32 ? 4 : 2;
  char* to = static_cast<char*>(y) + k * size;
  alignas(32) char part[32];
  if constexpr (D == DType::float32) {
    if (count >= 8) return _mm256_storeu_ps(reinterpret_cast<float*>(to), v);
    _mm256_store_ps(reinterpret_cast<float*>(part), v);
  } else {
    if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow<D>(v));
    _mm_store_si128(reinterpret_cast<__m128i*>(part), narrow<D>(v));
  }
  for (std::int64_t i = 0; i < count * size; ++i) to[i] = part[i];
}

}  // namespace
}  // namespace ranvier
