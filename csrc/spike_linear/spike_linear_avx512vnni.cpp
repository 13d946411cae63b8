// spike_linear, AVX-512 VNNI. One tile = up to 12 tokens (8 with many weight groups) x 32 outputs, 24 accumulators in
// registers; a 64-byte block of nibbles (4 channels x 32 outputs) is loaded and split once (3 operations) and meets every token
// by a broadcast of its 4 codes. Bytes: N K / 2 + M K + M N * size. Operations: one vpdpbusd per token, 4 channels and 16
// outputs, its issue rate the bound for M > 4; below, the read bandwidth is. The accumulators have names because GCC 12 spills
// arrays of them.
#include "spike_linear/spike_linear_avx512vnni.h"

namespace ranvier {
namespace {

// The same for a range of many groups: its float sums s##i and t##i grow by s_w v for each group, then y += s_x times them.
// They stay in registers beside the integer sums (a few are spilled round the dot products of a group, not inside), so fewer
// tokens fit; with more, two stores a group and token would cost more than the group's arithmetic.
template <int R>
void add_groups(const SpikeProduct& p, std::int64_t block, std::int64_t m, const std::int8_t* panel, const WeightRange& w,
                const std::uint8_t* first, Outputs y) {
  const std::int64_t groups = p.format.group_count(), ranges = p.format.ranges;
#define RANVIER_SUMS(i) __m512 s##i = _mm512_setzero_ps(), t##i = _mm512_setzero_ps();
  RANVIER_GROUP_ROWS(RANVIER_SUMS)
#undef RANVIER_SUMS
  std::int64_t index = w.index;
  for (std::int64_t begin = w.begin; begin < w.end; begin += w.step, ++index) {
    const std::int64_t end = begin + w.step < w.end ? begin + w.step : w.end;
    const std::uint8_t* from = first + (begin - w.begin) * kBlockBytes;
    RANVIER_DOTS(RANVIER_GROUP_ROWS)
#define RANVIER_ADD(i)                                                                   \
  if constexpr (R > i) {                                                                 \
    const std::int64_t at = (m + i) * ranges + w.range;                                  \
    s##i = _mm512_fmadd_ps(scales.low, product_of(p, at, a##i, scales.sum_low), s##i);   \
    t##i = _mm512_fmadd_ps(scales.high, product_of(p, at, b##i, scales.sum_high), t##i); \
  }
    RANVIER_GROUP_ROWS(RANVIER_ADD)
#undef RANVIER_ADD
  }
#define RANVIER_FINISH_GROUPS(i)                                                         \
  if constexpr (R > i) {                                                                 \
    const __m512 scale = _mm512_set1_ps(p.scale[(m + i) * ranges + w.range]);            \
    _mm512_store_ps(y[i], _mm512_fmadd_ps(scale, s##i, _mm512_load_ps(y[i])));           \
    _mm512_store_ps(y[i] + 16, _mm512_fmadd_ps(scale, t##i, _mm512_load_ps(y[i] + 16))); \
  }
  RANVIER_GROUP_ROWS(RANVIER_FINISH_GROUPS)
#undef RANVIER_FINISH_GROUPS
}

constexpr Add kAddGroups[kGroupedTileRows] = {add_groups<1>, add_groups<2>, add_groups<3>, add_groups<4>,
                                              add_groups<5>, add_groups<6>, add_groups<7>, add_groups<8>};

}  // namespace

extern "C" void spike_linear_block_avx512vnni(const SpikeProduct& p, std::int64_t block, std::int64_t first,
                                              std::int64_t last) {
  const std::uint8_t* weight = p.weight + block * p.format.block_count() * kBlockBytes;
  for_each_tile(p, block, first, last, [&](std::int64_t rows, std::int64_t m, const std::int8_t* panel, Outputs y) {
    const Add add = p.format.grouped() ? kAddGroups[rows - 1] : kAddRange[rows - 1];
    for_each_range(p.format, [&](const WeightRange& w) { add(p, block, m, panel, w, weight + w.begin * kBlockBytes, y); });
  });
}

}  // namespace ranvier
