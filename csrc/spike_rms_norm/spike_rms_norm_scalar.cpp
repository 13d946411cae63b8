// spike_rms_norm, any processor: the norm of one token in plain C++, in the order that every level keeps.
#include <cmath>

#include "spike_rms_norm/spike_rms_norm.h"

namespace ranvier {
namespace {

constexpr int kSums = 16;

float cast(float value, DType dtype) {
  if (dtype == DType::float32) return value;
  return dtype == DType::bfloat16 ? bf16_to_float(float_to_bf16(value)) : half_to_float(float_to_half(value));
}

}  // namespace

extern "C" void rms_norm_row_scalar(const RmsNorm& n, const void* x, void* y) {
  float sums[kSums] = {0};
  for (std::int64_t k = 0; k < n.K; ++k) {
    const float value = load_float(x, k, n.dtype);
    sums[k % kSums] = std::fma(value, value, sums[k % kSums]);
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  const float inverse = 1.0f / std::sqrt(sums[0] / static_cast<float>(n.K) + n.eps);
  for (std::int64_t k = 0; k < n.K; ++k) {
    const float scaled = load_float(x, k, n.dtype) * inverse, weight = load_float(n.weight, k, n.dtype);
    switch (n.weighting) {
      case Weighting::after_cast: store_float(y, k, n.dtype, weight * cast(scaled, n.dtype)); break;
      case Weighting::before_cast: store_float(y, k, n.dtype, scaled * weight); break;
      case Weighting::one_plus: store_float(y, k, n.dtype, scaled * (1.0f + weight)); break;
    }
  }
}

}  // namespace ranvier
