// spike_rms_norm: one token [K] normalised by its root mean square and weighted, then encoded while it is in L1.
//
//   r = 1 / sqrt(sum_k x_k^2 / K + eps)
//   y_k = w_k T(x_k r)  |  T(x_k r w_k)  |  T(x_k r (1 + w_k)),     T: to the type of x
//
// The sum has 16 partial sums, k mod 16, each grown by fused multiply-adds in ascending order, folded by halves. So every
// level has the same bits.
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {

enum class Weighting : std::int64_t { after_cast = 0, before_cast = 1, one_plus = 2 };

struct RmsNorm {
  const void* x;
  std::int64_t stride;  // from token to token
  DType dtype;          // of x, weight and y
  const void* weight;   // [K]
  std::int64_t K;
  float eps;
  Weighting weighting;
  void* y;  // [M, K]
};

// y: where the token goes.
using RmsNormRow = void (*)(const RmsNorm&, const void* x, void* y);

RmsNormRow rms_norm_row();

extern "C" {
void rms_norm_row_scalar(const RmsNorm&, const void* x, void* y);
void rms_norm_row_avx2(const RmsNorm&, const void* x, void* y);
void rms_norm_row_avx512(const RmsNorm&, const void* x, void* y);
}

// The norm alone.
Status rms_norm(const RmsNorm&, std::int64_t M);
// Norm and row-major codes, see spike_encode.
Status spike_rms_norm(const RmsNorm&, const SpikeFormat&, const std::uint8_t* mask, std::int64_t M, std::int8_t* codes,
                      float* scale, std::int32_t* sums, std::int32_t* zero);
// Norm and encoding, see spike_encode_panels.
Status spike_rms_norm_panels(const RmsNorm&, const SpikeFormat&, const std::uint8_t* mask, std::int64_t M, void* encoding);

}  // namespace ranvier
