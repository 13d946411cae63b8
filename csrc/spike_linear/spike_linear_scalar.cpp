// spike_linear, any processor: the formula over the packed layout.
#include "spike_linear/spike_linear_scalar.h"

namespace ranvier {

extern "C" void spike_linear_block_scalar(const SpikeProduct& p, std::int64_t block, std::int64_t first, std::int64_t last) {
  const std::uint8_t* weight = p.weight + block * p.format.block_count() * kBlockBytes;
  for_each_token(p, first, last, [&](std::int64_t m, const std::int8_t* codes, std::int64_t stride) {
    token(p, block, m, [&](std::int64_t, std::int64_t begin, std::int64_t end, std::int32_t* acc) {
      accumulate_nibbles(weight + begin * kBlockBytes, codes + begin * stride, stride, end - begin, acc);
    });
  });
}

}  // namespace ranvier
