// Scalar conversions between float32 and the 16-bit types, rounding to nearest even, NaN kept. Everything here has
// internal linkage: a copy compiled with wider instructions must never be the one the linker keeps for other files.
#pragma once

#include <cstdint>
#include <cstring>

// Members shared by files of several instruction sets are always inlined, for the same reason.
#define RANVIER_INLINE inline __attribute__((always_inline))

namespace ranvier {

enum class DType : std::int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

namespace {

[[maybe_unused]] inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] inline float bf16_to_float(std::uint16_t h) { return float_of(static_cast<std::uint32_t>(h) << 16); }

[[maybe_unused]] inline std::uint16_t float_to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact in float32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

[[maybe_unused]] inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65536 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the subnormal spacing 2^-24
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

[[maybe_unused]] inline float load_float(const void* base, std::int64_t index, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float*>(base)[index];
  const std::uint16_t half = static_cast<const std::uint16_t*>(base)[index];
  return dtype == DType::bfloat16 ? bf16_to_float(half) : half_to_float(half);
}

[[maybe_unused]] inline void store_float(void* base, std::int64_t index, DType dtype, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<std::uint16_t*>(base)[index] = dtype == DType::bfloat16 ? float_to_bf16(value) : float_to_half(value);
  }
}

}  // namespace
}  // namespace ranvier
