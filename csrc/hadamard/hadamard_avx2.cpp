// hadamard, AVX2 + FMA + F16C: vectors of eight.
#include <immintrin.h>

#include "hadamard/hadamard_vector.h"

namespace ranvier {
namespace {

struct Avx2 {
  using Reg = __m256;
  static constexpr std::int64_t kLanes = 8;
  static constexpr int kColumns = 2;  // 8 sums, 2 of x, 4 coefficients: 14 of 16 registers

  static RANVIER_INLINE Reg load(const float* p) { return _mm256_load_ps(p); }
  static RANVIER_INLINE void store(float* p, Reg v) { _mm256_store_ps(p, v); }
  static RANVIER_INLINE Reg set(float v) { return _mm256_set1_ps(v); }
  static RANVIER_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static RANVIER_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static RANVIER_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static RANVIER_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

  // The lane with the higher index subtracts itself from its partner: v * -1 + partner, exact but for the addition.
  static RANVIER_INLINE Reg lanes(Reg v) {
    v = fma(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
    v = fma(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4e));
    return fma(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 0x01));
  }

  static RANVIER_INLINE Reg load_x(const void* x, std::int64_t i, DType dtype) {
    if (dtype == DType::float32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(x) + i));
    if (dtype == DType::float16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static RANVIER_INLINE void store_y(void* y, std::int64_t i, DType dtype, Reg v) {
    if (dtype == DType::float32) return _mm256_storeu_ps(static_cast<float*>(y) + i, v);
    __m128i half;
    if (dtype == DType::float16) {
      half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i bits = _mm256_castps_si256(v), top = _mm256_srli_epi32(bits, 16);
      const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
      const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), quiet, nan);
      half = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(y) + i), half);
  }
};

}  // namespace

extern "C" void hadamard_rows_avx2(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work) {
  hadamard_vector_rows<Avx2>(h, begin, end, work);
}

}  // namespace ranvier
