// ternary_linear: spike codes x packed 2-bit weights, whose salient input channels have codes of 4 bits.
//
//   y[m, n] = b[n] + s_x[m] sum_r s_w[n, r] ( sum_{k in r} c[m, k] q[n, k] - z_w[n, r] sum_{k in r} c[m, k] )
//
// Range r = 0 are the ordinary channels, q 0..3; r = 1 the salient ones, q 0..15, the sum of their spikes over all steps.
// Weights: [N/32][blocks][64 bytes], for 32 outputs first the ordinary blocks, of eight channels each, then the salient blocks
// of spike_linear, of four. Byte 4 i + j of an ordinary block holds from its low bits upwards: channel j for output i, channel
// j for output 16 + i, channel 4 + j for output i, channel 4 + j for output 16 + i. All else is spike_linear's.
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {

constexpr std::int64_t kTwoBitTop = 3, kNibbleTop = 15;

// Where a range's weights are: 64-byte blocks of 32 outputs.
struct TernaryLayout {
  bool two_bit[2];        // whether range r holds ordinary channels
  std::int64_t begin[2];  // its first block
  std::int64_t blocks;    // of all

  explicit RANVIER_INLINE TernaryLayout(const SpikeFormat& f) : two_bit{f.low > 0, false}, begin{0, 0}, blocks(0) {
    const std::int64_t first = two_bit[0] ? (f.blocks(0) + 1) / 2 : f.blocks(0);
    begin[1] = first;
    blocks = first + (f.ranges == 2 ? f.blocks(1) : 0);
  }
};

SpikeLinearBlock ternary_linear_block();

extern "C" {
void ternary_linear_block_scalar(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
void ternary_linear_block_avx2(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
void ternary_linear_block_avx512vnni(const SpikeProduct&, std::int64_t block, std::int64_t first, std::int64_t last);
}

// Whether the layer's format is one that 2-bit weights can have.
bool is_ternary_format(const SpikeFormat&);

// The product of row-major codes [M, K], in the layer's own order of channels, with one scale a token.
Status ternary_linear(const SpikeLayer&, const std::int8_t* codes, const float* scale, std::int64_t M, void* y, DType y_dtype);

}  // namespace ranvier
