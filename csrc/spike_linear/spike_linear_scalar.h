// What the scalar kernels of packed weights share (internal linkage, see core/numeric.h).
#pragma once

#include "spike_linear/spike_linear_groups.h"

namespace ranvier {
namespace {

// sum over the group of c * q for one token and all 32 outputs of the block
[[maybe_unused]] void accumulate_nibbles(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride,
                                         std::int64_t blocks, std::int32_t* acc) {
  for (std::int64_t b = 0; b < blocks; ++b, weight += kBlockBytes, codes += stride) {
    for (int i = 0; i < 64; ++i) {
      acc[i / 4] += codes[i % 4] * (weight[i] & 15);
      acc[16 + i / 4] += codes[i % 4] * (weight[i] >> 4);
    }
  }
}

// One token; accumulate(range, first block, one past the last, sums) adds a group's integer products for 32 outputs.
template <class Accumulate>
void token(const SpikeProduct& p, std::int64_t block, std::int64_t m, const Accumulate& accumulate) {
  const SpikeFormat& f = p.format;
  const std::int64_t groups = f.group_count(), ranges = f.ranges, first = block * kOutputBlock;
  const std::int64_t width = p.N - first < kOutputBlock ? p.N - first : kOutputBlock;
  float y[kOutputBlock];
  for (std::int64_t n = 0; n < width; ++n) {
    y[n] = p.bias == nullptr ? 0.0f : load_float(p.bias, first + n, p.bias_dtype);
  }
  for_each_range(f, [&](const WeightRange& w) {
    const std::int64_t at = m * ranges + w.range;
    float t[kOutputBlock] = {0};
    for_each_group(w, [&](std::int64_t g, std::int64_t begin, std::int64_t end) {
      std::int32_t acc[kOutputBlock] = {0};
      accumulate(w.range, begin, end, acc);
      const std::int64_t table = (block * groups + g) * kOutputBlock;
      for (std::int64_t n = 0; n < width; ++n) {
        float v = static_cast<float>(acc[n] - p.weight_zero[table + n] * p.sums[m * groups + g]);
        if (p.zero != nullptr) {
          v = __builtin_fmaf(-static_cast<float>(p.zero[at]), static_cast<float>(p.weight_sum[table + n]), v);
        }
        t[n] = __builtin_fmaf(p.weight_scale[table + n], v, t[n]);
      }
    });
    for (std::int64_t n = 0; n < width; ++n) y[n] = __builtin_fmaf(p.scale[at], t[n], y[n]);
  });
  for (std::int64_t n = 0; n < width; ++n) store_float(p.y, m * p.N + first + n, p.y_dtype, y[n]);
}

// step(token, its codes, stride of a block's codes) for the tokens of tiles [first, last)
template <class Step>
void for_each_token(const SpikeProduct& p, std::int64_t first, std::int64_t last, const Step& step) {
  const std::int64_t row_bytes = 4 * p.format.block_count();
  for (std::int64_t t = first; t < last; ++t) {
    const std::int64_t begin = p.tile_begin(t), rows = p.tile_begin(t + 1) - begin;
    for (std::int64_t i = 0; i < rows; ++i) step(begin + i, p.panels + begin * row_bytes + 4 * i, 4 * rows);
  }
}

}  // namespace
}  // namespace ranvier
