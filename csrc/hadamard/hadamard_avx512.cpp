// hadamard, AVX-512: vectors of sixteen.
#include <immintrin.h>

#include "hadamard/hadamard_vector.h"

namespace ranvier {
namespace {

struct Avx512 {
  using Reg = __m512;
  static constexpr std::int64_t kLanes = 16;
  static constexpr int kColumns = 4;  // 16 sums, 1 of x, 4 coefficients: 21 of 32 registers

  static RANVIER_INLINE Reg load(const float* p) { return _mm512_load_ps(p); }
  static RANVIER_INLINE void store(float* p, Reg v) { _mm512_store_ps(p, v); }
  static RANVIER_INLINE Reg set(float v) { return _mm512_set1_ps(v); }
  static RANVIER_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static RANVIER_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static RANVIER_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static RANVIER_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  // Lanes in `mask` have the higher index of their pair: partner - v, elsewhere v + partner.
  static RANVIER_INLINE Reg pair(Reg v, Reg partner, __mmask16 mask) {
    return _mm512_mask_sub_ps(_mm512_add_ps(v, partner), mask, partner, v);
  }
  static RANVIER_INLINE Reg lanes(Reg v) {
    v = pair(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
    v = pair(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
    v = pair(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
    return pair(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
  }

  static RANVIER_INLINE Reg load_x(const void* x, std::int64_t i, DType dtype) {
    if (dtype == DType::float32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(x) + i));
    if (dtype == DType::float16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  static RANVIER_INLINE void store_y(void* y, std::int64_t i, DType dtype, Reg v) {
    if (dtype == DType::float32) return _mm512_storeu_ps(static_cast<float*>(y) + i, v);
    __m256i half;
    if (dtype == DType::float16) {
      half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512i bits = _mm512_castps_si512(v), top = _mm512_srli_epi32(bits, 16);
      const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
      const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      half = _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(even, nan, top, _mm512_set1_epi32(0x40)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(y) + i), half);
  }
};

}  // namespace

extern "C" void hadamard_rows_avx512(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work) {
  hadamard_vector_rows<Avx512>(h, begin, end, work);
}

}  // namespace ranvier
