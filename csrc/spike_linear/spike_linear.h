// spike_linear: spike codes x packed 4-bit weights.
//
//   y[m, n] = b[n] + sum_r s_x[m, r] sum_{g in r} s_w[n, g] ( sum_{k in g} c[m, k] (q[n, k] - z_w[n, g]) - z_x[m, r] S[n, g] )
//
// z_x and S[n, g] = sum_{k in g} (q - z_w) only exist for compat codes. Weights: [N/32][blocks][64 bytes]; byte 4 i + j of
// a block holds channel j of the block's four channels for output i (low nibble) and output 16 + i (high nibble).
// Codes: panels of up to 12 tokens (8 where a range has many groups), [blocks][tokens][4 bytes], so that one broadcast feeds 32
// outputs.
#pragma once

#include "core/status.h"
#include "spike_encode/spike_encode.h"

namespace ranvier {

constexpr std::int64_t kOutputBlock = 32, kBlockBytes = 64;
// The most tokens of a tile, with one weight group a range and with many: what the registers of AVX-512 hold.
constexpr std::int64_t kTileRows = 12, kGroupedTileRows = 8;

// A layer as its owner describes it: int64 fields only, so that the caller can pack it in one go.
struct SpikeLayer {
  SpikeFormat format;
  std::int64_t N;
  std::int64_t mask;          // uint8 [K] or 0
  std::int64_t weight;        // uint8 [N/32][blocks][64]
  std::int64_t weight_scale;  // float32 [N/32][groups][32]
  std::int64_t weight_zero;   // uint8 [N/32][groups][32]
  std::int64_t weight_sum;    // int32 [N/32][groups][32]; compat only, else 0
  std::int64_t bias;          // [N] or 0
  std::int64_t bias_dtype;    // DType
  std::int64_t weight_bits;   // 4, or 2: the weights of ternary_linear/ternary_linear.h
};

// One call, ready for the kernels.
struct SpikeProduct {
  SpikeFormat format;
  std::int64_t M, N;
  const std::int8_t* panels;
  const float* scale;        // [M, ranges]
  const std::int32_t* sums;  // [M, groups]
  const std::int32_t* zero;  // [M, ranges] or nullptr
  const std::uint8_t* weight;
  const float* weight_scale;
  const std::uint8_t* weight_zero;
  const std::int32_t* weight_sum;
  const void* bias;
  DType bias_dtype;
  void* y;  // [M, N]
  DType y_dtype;

  RANVIER_INLINE std::int64_t tiles() const {
    const std::int64_t rows = format.grouped() ? kGroupedTileRows : kTileRows;
    return (M + rows - 1) / rows;
  }
  // Tiles differ by one row at most: no size of M leaves a narrow, inefficient tile behind.
  RANVIER_INLINE std::int64_t tile_begin(std::int64_t t) const { return t * M / tiles(); }
};

// Outputs [32 * block, +32) for the tokens of tiles [first, last); one thread.
using SpikeLinearBlock = void (*)(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);

SpikeLinearBlock spike_linear_block();

extern "C" {
void spike_linear_block_scalar(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
void spike_linear_block_avx2(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
void spike_linear_block_avx512vnni(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
}

// Rows that are made where they are encoded: row(context, m) writes token m or finds it, and returns where its K values are.
// Called once a token, from any thread.
struct SpikeSource {
  const void* (*row)(const void* context, std::int64_t m);
  const void* context;
  DType dtype;
};

// Row-major codes [M, K] for callers that look at them: codes, scale [M, ranges], sums [M, groups], zero [M, ranges].
Status spike_encode(const SpikeFormat&, const std::uint8_t* mask, const void* x, std::int64_t x_stride, DType dtype,
                    std::int64_t M, std::int8_t* codes, float* scale, std::int32_t* sums, std::int32_t* zero);
Status spike_encode(const SpikeFormat&, const std::uint8_t* mask, const SpikeSource&, std::int64_t M, std::int8_t* codes,
                    float* scale, std::int32_t* sums, std::int32_t* zero);
// The product of row-major codes.
Status spike_linear(const SpikeLayer&, const std::int8_t* codes, const float* scale, const std::int32_t* sums,
                    const std::int32_t* zero, std::int64_t M, void* y, DType y_dtype);

// An encoding that several layers read: one buffer with scales, sums, zeros and panels.
std::int64_t spike_encoding_bytes(const SpikeFormat&, std::int64_t M);
Status spike_encode_panels(const SpikeFormat&, const std::uint8_t* mask, const void* x, std::int64_t x_stride, DType dtype,
                           std::int64_t M, void* encoding);
Status spike_encode_panels(const SpikeFormat&, const std::uint8_t* mask, const SpikeSource&, std::int64_t M, void* encoding);
Status spike_linear_panels(const SpikeLayer&, const void* encoding, std::int64_t M, void* y, DType y_dtype);
// Two layers that read one encoding, their work shared among the threads as one.
Status spike_linear_pair(const SpikeLayer& first, const SpikeLayer& second, const void* encoding, std::int64_t M, void* y_first,
                         void* y_second, DType y_dtype);
// Both in one call, the encoding in memory of the calling thread.
Status spike_linear_dynamic(const SpikeLayer&, const void* x, std::int64_t x_stride, DType dtype, std::int64_t M, void* y,
                            DType y_dtype);

}  // namespace ranvier
