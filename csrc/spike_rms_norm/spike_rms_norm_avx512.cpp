// spike_rms_norm, AVX-512 (F, BW, DQ, VL): a token is read from memory once and from L1 once more, and written once.
#include "core/float_avx512.h"
#include "spike_rms_norm/spike_rms_norm.h"

namespace ranvier {
namespace {

float inverse_root(float mean, float eps) {
  const __m128 root = _mm_sqrt_ss(_mm_set_ss(mean + eps));
  return 1.0f / _mm_cvtss_f32(root);
}

// Halves folded onto each other: 16, 8, 4, 2, 1.
float fold(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <DType D>
void run(const RmsNorm& n, const void* x, void* y) {
  __m512 sums = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < n.K; k += 16) {
    const __m512 value = load_lanes<D>(x, k, lanes_from(k, n.K));
    sums = _mm512_fmadd_ps(value, value, sums);
  }
  const __m512 inverse = _mm512_set1_ps(inverse_root(fold(sums) / static_cast<float>(n.K), n.eps));
  for (std::int64_t k = 0; k < n.K; k += 16) {
    const __mmask16 lanes = lanes_from(k, n.K);
    __m512 value = _mm512_mul_ps(load_lanes<D>(x, k, lanes), inverse), weight = load_lanes<D>(n.weight, k, lanes);
    if (n.weighting == Weighting::after_cast) value = rounded_to<D>(value);
    if (n.weighting == Weighting::one_plus) weight = _mm512_add_ps(_mm512_set1_ps(1.0f), weight);
    store_lanes<D>(y, k, lanes, _mm512_mul_ps(value, weight));
  }
}

}  // namespace

extern "C" void rms_norm_row_avx512(const RmsNorm& n, const void* x, void* y) {
  if (n.dtype == DType::float32) return run<DType::float32>(n, x, y);
  if (n.dtype == DType::bfloat16) return run<DType::bfloat16>(n, x, y);
  run<DType::float16>(n, x, y);
}

}  // namespace ranvier
