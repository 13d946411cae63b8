// The digits of one token: loops that the compiler turns into each level's vectors. No product feeds a sum here, so every
// level rounds alike. Internal linkage and builtins throughout, see core/numeric.h.
#pragma once

#include "weight_only_linear/weight_only_linear.h"

namespace ranvier {
namespace {

template <int Digits, class Load>
void encode_digits_as(const DigitRow& row, const Load& load) {
  std::uint32_t largest = 0;
  for (std::int64_t k = 0; k < row.K; ++k) {
    const std::uint32_t magnitude = bits_of(load(k)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const std::int64_t group = row.group == 0 || row.group > row.K ? row.K : row.group, groups = (row.K + group - 1) / group;
  if (largest >= 0x7f800000u) {  // NaN or Inf: no digits, and a scale that makes every output NaN
    __builtin_memset(row.codes, 0, static_cast<std::size_t>(Digits * row.K));
    for (std::int64_t i = 0; i < Digits * groups; ++i) row.sums[i] = 0;
    for (std::int64_t p = 0; p < Digits; ++p) row.scale[p] = __builtin_nanf("");
    return;
  }
  constexpr float top = Digits == 3 ? 8355711.0f : Digits == 2 ? 32639.0f : 127.0f;
  // The bound keeps the division finite for a token of zeros or subnormals.
  const float step = __builtin_fmaxf(float_of(largest) / top, 1e-37f);
  for (std::int64_t k = 0; k < row.K; ++k) {
    const float rounded = __builtin_rintf(load(k) / step), below = rounded > top ? top : rounded;
    const std::int32_t c = static_cast<std::int32_t>(below < -top ? -top : below);
    const std::int32_t low = static_cast<std::int8_t>(c), rest = (c - low) >> 8;
    const std::int32_t middle = static_cast<std::int8_t>(rest), high = (rest - middle) >> 8;
    row.codes[k] = static_cast<std::int8_t>(low);
    if (Digits > 1) row.codes[row.K + k] = static_cast<std::int8_t>(middle);
    if (Digits > 2) row.codes[2 * row.K + k] = static_cast<std::int8_t>(high);
  }
  float scale = step;
  for (std::int64_t p = 0; p < Digits; ++p, scale *= 256.0f) {
    row.scale[p] = scale;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t end = (g + 1) * group < row.K ? (g + 1) * group : row.K;
      std::int32_t sum = 0;
      for (std::int64_t k = g * group; k < end; ++k) sum += row.codes[p * row.K + k];
      row.sums[p * groups + g] = sum;
    }
  }
}

template <class Load>
void encode_digits_from(const DigitRow& row, const Load& load) {
  if (row.digits == 3) return encode_digits_as<3>(row, load);
  if (row.digits == 2) return encode_digits_as<2>(row, load);
  encode_digits_as<1>(row, load);
}

[[maybe_unused]] inline void encode_digits_here(const DigitRow& row) {
  const auto* half = static_cast<const std::uint16_t*>(row.x);
  const auto* full = static_cast<const float*>(row.x);
  if (row.dtype == DType::float32) return encode_digits_from(row, [full](std::int64_t k) { return full[k]; });
  if (row.dtype == DType::bfloat16) return encode_digits_from(row, [half](std::int64_t k) { return bf16_to_float(half[k]); });
  encode_digits_from(row, [half](std::int64_t k) { return half_to_float(half[k]); });
}

}  // namespace
}  // namespace ranvier
