// ternary_linear, any processor: the formula over the packed layout.
#include "spike_linear/spike_linear_scalar.h"
#include "ternary_linear/ternary_linear.h"

namespace ranvier {
namespace {

// sum of c * q over `blocks` blocks of four channels, which lie in pairs
void accumulate_two_bit(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride, std::int64_t blocks,
                        std::int32_t* acc) {
  for (std::int64_t b = 0; b < blocks; ++b, codes += stride) {
    const std::uint8_t* pair = weight + b / 2 * kBlockBytes;
    const int shift = b % 2 == 0 ? 0 : 4;
    for (int i = 0; i < 64; ++i) {
      acc[i / 4] += codes[i % 4] * (pair[i] >> shift & 3);
      acc[16 + i / 4] += codes[i % 4] * (pair[i] >> (shift + 2) & 3);
    }
  }
}

}  // namespace

extern "C" void ternary_linear_block_scalar(const SpikeProduct& p, std::int64_t block, std::int64_t first, std::int64_t last) {
  const TernaryLayout layout(p.format);
  const std::uint8_t* row = p.weight + block * layout.blocks * kBlockBytes;
  for_each_token(p, first, last, [&](std::int64_t m, const std::int8_t* codes, std::int64_t stride) {
    token(p, block, m, [&](std::int64_t range, std::int64_t begin, std::int64_t end, std::int32_t* acc) {
      const std::uint8_t* weight = row + layout.begin[range] * kBlockBytes;
      const auto accumulate = layout.two_bit[range] ? accumulate_two_bit : accumulate_nibbles;
      accumulate(weight, codes + begin * stride, stride, end - begin, acc);
    });
  });
}

}  // namespace ranvier
