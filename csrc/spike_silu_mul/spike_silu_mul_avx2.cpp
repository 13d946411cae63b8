// spike_silu_mul, AVX2 + FMA + F16C: eight channels at a time.
#include "core/float_avx2.h"
#include "spike_silu_mul/spike_silu_mul.h"

namespace ranvier {
namespace {

RANVIER_INLINE __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

RANVIER_INLINE __m256 exp_negative(__m256 g) {
  __m256 z = _mm256_xor_ps(g, _mm256_set1_ps(-0.0f));
  z = _mm256_min_ps(_mm256_max_ps(z, _mm256_set1_ps(-kExpEnd)), _mm256_set1_ps(kExpEnd));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(z, _mm256_set1_ps(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), z));
  __m256 p = _mm256_set1_ps(kExp[0]);
  for (int i = 1; i < 8; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp[i]));
  const __m256i whole = _mm256_cvttps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

template <DType D>
void run(const void* gate, const void* up, std::int64_t K, void* y) {
  for (std::int64_t k = 0; k < K; k += 8) {
    const __m256 g = load_lanes<D>(gate, k, K - k);
    const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_negative(g)));
    store_lanes<D>(y, k, K - k, _mm256_mul_ps(rounded_to<D>(silu), load_lanes<D>(up, k, K - k)));
  }
}

}  // namespace

extern "C" void silu_mul_row_avx2(const void* gate, const void* up, DType dtype, std::int64_t K, void* y) {
  if (dtype == DType::float32) return run<DType::float32>(gate, up, K, y);
  if (dtype == DType::bfloat16) return run<DType::bfloat16>(gate, up, K, y);
  run<DType::float16>(gate, up, K, y);
}

}  // namespace ranvier
