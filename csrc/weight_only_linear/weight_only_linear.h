// weight_only_linear: float activations x packed 4-bit weights, in integers.
//
//   x[m, k] = s[m] sum_p 256^p d_p[m, k],  |d_p| <= 128,  s = max|x| / (127 (256^P - 1) / 255)
//   y[m, n] = b[n] + sum_p 256^p s[m] sum_g s_w[n, g] sum_{k in g} d_p[m, k] (q[n, k] - z_w[n, g])
//
// A token becomes P rows of int8 radix-256 digits, the lowest digit first, and the product of codes multiplies them: with
// P = 3 the digits carry a float32's 24 bits at the token's largest magnitude, with P = 2 more than a 16-bit float's.
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {

constexpr std::int64_t kMostDigits = 3;

// One token's digits.
struct DigitRow {
  const void* x;
  DType dtype;
  std::int64_t K, digits;
  std::int64_t group;  // channels per code sum; K or more: one
  std::int8_t* codes;  // [digits, K]
  float* scale;        // [digits]
  std::int32_t* sums;  // [digits, groups]
};

using EncodeDigits = void (*)(const DigitRow&);

EncodeDigits encode_digits();

extern "C" {
void encode_digits_scalar(const DigitRow&);
void encode_digits_avx2(const DigitRow&);
void encode_digits_avx512(const DigitRow&);
}

// The layer's format must have one range of symmetric 8-bit codes, or, with 2-bit weights, be one of theirs.
Status weight_only_linear(const SpikeLayer&, const void* x, std::int64_t x_stride, DType dtype, std::int64_t M,
                          std::int64_t digits, void* y, DType y_dtype);

}  // namespace ranvier
