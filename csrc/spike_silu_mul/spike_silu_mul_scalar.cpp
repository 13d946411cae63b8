// spike_silu_mul, any processor: one token in plain C++, in the order that every level keeps.
#include <cmath>

#include "spike_silu_mul/spike_silu_mul.h"

namespace ranvier {
namespace {

float cast(float value, DType dtype) {
  if (dtype == DType::float32) return value;
  return dtype == DType::bfloat16 ? bf16_to_float(float_to_bf16(value)) : half_to_float(float_to_half(value));
}

float power_of_two(int n) { return float_of(static_cast<std::uint32_t>(n + 127) << 23); }

float exp_negative(float g) {
  // NaN takes a bound too; the division by 1 + e brings it back.
  float z = -g;
  z = z > -kExpEnd ? z : -kExpEnd;
  z = z < kExpEnd ? z : kExpEnd;
  const float n = std::rint(z * kLog2e);
  const float r = std::fma(-n, kLn2Low, std::fma(-n, kLn2High, z));
  float p = kExp[0];
  for (int i = 1; i < 8; ++i) p = std::fma(p, r, kExp[i]);
  const int whole = static_cast<int>(n), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

}  // namespace

extern "C" void silu_mul_row_scalar(const void* gate, const void* up, DType dtype, std::int64_t K, void* y) {
  for (std::int64_t k = 0; k < K; ++k) {
    const float g = load_float(gate, k, dtype), u = load_float(up, k, dtype);
    store_float(y, k, dtype, cast(g / (1.0f + exp_negative(g)), dtype) * u);
  }
}

}  // namespace ranvier
