// spike_rms_norm, AVX2 + FMA + F16C: the sixteen partial sums in two registers.
#include "core/float_avx2.h"
#include "spike_rms_norm/spike_rms_norm.h"

namespace ranvier {
namespace {

float inverse_root(float mean, float eps) {
  const __m128 root = _mm_sqrt_ss(_mm_set_ss(mean + eps));
  return 1.0f / _mm_cvtss_f32(root);
}

// Halves folded onto each other: 16, 8, 4, 2, 1.
float fold(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <DType D>
void run(const RmsNorm& n, const void* x, void* y) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (std::int64_t k = 0; k < n.K; k += 8) {
    const __m256 value = load_lanes<D>(x, k, n.K - k);
    __m256& sum = sums[k / 8 % 2];
    sum = _mm256_fmadd_ps(value, value, sum);
  }
  const __m256 inverse = _mm256_set1_ps(inverse_root(fold(sums[0], sums[1]) / static_cast<float>(n.K), n.eps));
  for (std::int64_t k = 0; k < n.K; k += 8) {
    __m256 value = _mm256_mul_ps(load_lanes<D>(x, k, n.K - k), inverse), weight = load_lanes<D>(n.weight, k, n.K - k);
    if (n.weighting == Weighting::after_cast) value = rounded_to<D>(value);
    if (n.weighting == Weighting::one_plus) weight = _mm256_add_ps(_mm256_set1_ps(1.0f), weight);
    store_lanes<D>(y, k, n.K - k, _mm256_mul_ps(value, weight));
  }
}

}  // namespace

extern "C" void rms_norm_row_avx2(const RmsNorm& n, const void* x, void* y) {
  if (n.dtype == DType::float32) return run<DType::float32>(n, x, y);
  if (n.dtype == DType::bfloat16) return run<DType::bfloat16>(n, x, y);
  run<DType::float16>(n, x, y);
}

}  // namespace ranvier
