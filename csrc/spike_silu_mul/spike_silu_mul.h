// spike_silu_mul: one token of a gated layer, y_k = T(T(g_k / (1 + e^-g_k)) u_k), T: to the type of g, then encoded in L1.
//
// e^z = 2^n P(z - n ln 2), n = rint(z log2 e), P the Taylor polynomial of degree 7 by Horner's rule, every step fused:
// 0.1 units in the last place of truncation on |r| <= ln 2 / 2. z is cut to +-104, where e^z and 1 + e^z have their limits.
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {

struct SiluMul {
  const void* gate;  // [M, K]
  const void* up;    // [M, K]
  DType dtype;
  std::int64_t K;
  void* y;  // [M, K], may be gate
};

using SiluMulRow = void (*)(const void* gate, const void* up, DType dtype, std::int64_t K, void* y);

SiluMulRow silu_mul_row();

extern "C" {
void silu_mul_row_scalar(const void* gate, const void* up, DType dtype, std::int64_t K, void* y);
void silu_mul_row_avx2(const void* gate, const void* up, DType dtype, std::int64_t K, void* y);
void silu_mul_row_avx512(const void* gate, const void* up, DType dtype, std::int64_t K, void* y);
}

// Row-major codes of the gated product, see spike_encode.
Status spike_silu_mul(const SiluMul&, const SpikeFormat&, const std::uint8_t* mask, std::int64_t M, std::int8_t* codes,
                      float* scale, std::int32_t* sums, std::int32_t* zero);

// A gated MLP of spiking layers. gate and up must have one format; x [M, K] contiguous, or its encoding where there is one.
struct SpikeMlp {
  SpikeLayer gate, up, down;
  const void* x;         // read where there is no encoding
  const void* encoding;  // of x, see spike_encode_panels, or nullptr
  void* hidden;          // [2, M, N] of the type of x: memory for the outputs of gate and up
  void* y;               // [M, N of down]
  DType dtype;
};

Status spike_gated_mlp(const SpikeMlp&, std::int64_t M);

namespace {

// 1/i!, highest power first; log2 e; ln 2 in two parts, the first with 9 zero bits at its end, so that n times it is exact.
constexpr float kExp[8] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kExpEnd = 104.0f;

}  // namespace
}  // namespace ranvier
