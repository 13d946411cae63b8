// spike_silu_mul, AVX-512 (F, BW, DQ, VL): some 25 operations and one division for sixteen channels.
#include "core/float_avx512.h"
#include "spike_silu_mul/spike_silu_mul.h"

namespace ranvier {
namespace {

RANVIER_INLINE __m512 power_of_two(__m512i n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

RANVIER_INLINE __m512 exp_negative(__m512 g) {
  __m512 z = _mm512_xor_ps(g, _mm512_set1_ps(-0.0f));
  z = _mm512_min_ps(_mm512_max_ps(z, _mm512_set1_ps(-kExpEnd)), _mm512_set1_ps(kExpEnd));
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), z));
  __m512 p = _mm512_set1_ps(kExp[0]);
  for (int i = 1; i < 8; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp[i]));
  const __m512i whole = _mm512_cvttps_epi32(n), half = _mm512_srai_epi32(whole, 1);
  return _mm512_mul_ps(_mm512_mul_ps(p, power_of_two(half)), power_of_two(_mm512_sub_epi32(whole, half)));
}

template <DType D>
void run(const void* gate, const void* up, std::int64_t K, void* y) {
  for (std::int64_t k = 0; k < K; k += 16) {
    const __mmask16 lanes = lanes_from(k, K);
    const __m512 g = load_lanes<D>(gate, k, lanes);
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_negative(g)));
    store_lanes<D>(y, k, lanes, _mm512_mul_ps(rounded_to<D>(silu), load_lanes<D>(up, k, lanes)));
  }
}

}  // namespace

extern "C" void silu_mul_row_avx512(const void* gate, const void* up, DType dtype, std::int64_t K, void* y) {
  if (dtype == DType::float32) return run<DType::float32>(gate, up, K, y);
  if (dtype == DType::bfloat16) return run<DType::bfloat16>(gate, up, K, y);
  run<DType::float16>(gate, up, K, y);
}

}  // namespace ranvier
