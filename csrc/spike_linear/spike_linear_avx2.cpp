// spike_linear, AVX2 + FMA + F16C. vpmaddubsw sums pairs of products in int16; a pair is at most 30 * max|code|, so
// floor(32767 / (30 * max|code|)) blocks fit before the sums are widened to int32 (72, 36 and 18 for 15, 30 and 60).
// Half a block (32 bytes: 8 + 8 outputs) meets up to four tokens at a time.
#include "spike_linear/spike_linear_avx2.h"

namespace ranvier {
namespace {

template <int R>
void nibble_rows(const SpikeProduct& p, std::int64_t block, std::int64_t m, const std::int8_t* codes, std::int64_t stride) {
  const SpikeFormat& f = p.format;
  const std::int64_t window[2] = {window_of(f, 0, 15), window_of(f, f.ranges - 1, 15)};
  rows<R>(p, block, m, [&](std::int64_t range, std::int64_t begin, std::int64_t end, std::int32_t (*acc)[kOutputBlock]) {
    const std::uint8_t* weight = p.weight + (block * f.block_count() + begin) * kBlockBytes;
    accumulate<R>(weight, codes + begin * stride, stride, end - begin, window[range], acc);
  });
}

}  // namespace

extern "C" void spike_linear_block_avx2(const SpikeProduct& p, std::int64_t block, std::int64_t first, std::int64_t last) {
  for_each_step(p, first, last, [&](std::int64_t count, std::int64_t m, const std::int8_t* codes, std::int64_t stride) {
    switch (count) {
      case 4: nibble_rows<4>(p, block, m, codes, stride); break;
      case 3: nibble_rows<3>(p, block, m, codes, stride); break;
      case 2: nibble_rows<2>(p, block, m, codes, stride); break;
      default: nibble_rows<1>(p, block, m, codes, stride); break;
    }
  });
}

}  // namespace ranvier
