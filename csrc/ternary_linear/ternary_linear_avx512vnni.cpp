// ternary_linear, AVX-512 VNNI. The tiles of spike_linear: up to 12 tokens x 32 outputs in 24 accumulators. A 64-byte block (8
// channels x 32 outputs) is loaded and split once (7 operations) and meets every token by two broadcasts of 4 codes. Bytes:
// N K / 4 + M K + M N * size. Operations: one vpdpbusd per token, 4 channels and 16 outputs, its issue rate the bound for M >
// 2; below, the read bandwidth is.
#include "spike_linear/spike_linear_avx512vnni.h"
#include "ternary_linear/ternary_linear.h"

namespace ranvier {
namespace {

// Channels 0-3 or 4-7 of a block, for outputs 0-15 (low) and 16-31 (high).
template <int Half>
RANVIER_INLINE Nibbles fields(__m512i packed) {
  const __m512i mask = _mm512_set1_epi8(3);
  const __m512i low = Half == 0 ? packed : _mm512_srli_epi16(packed, 4);
  return {_mm512_and_si512(low, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4 * Half + 2), mask)};
}

// How far ahead memory is asked for. One token uses a block up in a few cycles, so lines are wanted in L2 8 KiB before; with a
// few tokens as in `unpack`, in half as many blocks, each of which takes twice as long; with many the weights lie in L2.
template <int R>
RANVIER_INLINE __m512i load_block(const std::uint8_t* weight) {
  const char* from = reinterpret_cast<const char*>(weight);
  constexpr int kFar = R == 1 ? 128 : 32, kNear = R == 1 ? 32 : R > 8 ? 16 : 4;
  if constexpr (R <= 8) _mm_prefetch(from + kFar * kBlockBytes, _MM_HINT_T1);
  _mm_prefetch(from + kNear * kBlockBytes, _MM_HINT_T0);
  return _mm512_loadu_si512(weight);
}

// One token: four chains of dot products in flight.
RANVIER_INLINE void dot_one_two_bit(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t pairs, __m512i& a,
                                    __m512i& b) {
  __m512i a1 = _mm512_setzero_si512(), b1 = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < pairs; ++k, weight += kBlockBytes, codes += 8) {
    const __m512i packed = load_block<1>(weight);
    const Nibbles first = fields<0>(packed), second = fields<1>(packed);
    const __m512i c0 = _mm512_set1_epi32(load32(codes)), c1 = _mm512_set1_epi32(load32(codes + 4));
    dot(a, first.low, c0);
    dot(b, first.high, c0);
    dot(a1, second.low, c1);
    dot(b1, second.high, c1);
  }
  a = _mm512_add_epi32(a, a1);
  b = _mm512_add_epi32(b, b1);
}

// Tokens [m, m + R) and the ordinary channels, whose blocks begin at `from`.
template <int R>
void add_two_bit(const SpikeProduct& p, std::int64_t block, std::int64_t m, const std::int8_t* panel, const WeightRange& w,
                 const std::uint8_t* from, Outputs y) {
  const std::int64_t groups = p.format.group_count(), ranges = p.format.ranges;
  const std::int64_t index = w.index, blocks = w.end - w.begin, table = (block * groups + index) * kOutputBlock;
  const MinusZeros minus_zeros = load_minus_zeros(p, table);
  const std::uint8_t* weight = from;
  const std::int8_t* codes = panel + w.begin * 4 * R;
  RANVIER_ROWS(RANVIER_START)
  if constexpr (R == 1) {
    dot_one_two_bit(weight, codes, blocks / 2, a0, b0);
    weight += blocks / 2 * kBlockBytes, codes += blocks / 2 * 8;
  } else {
    for (std::int64_t k = 0; k < blocks / 2; ++k, weight += kBlockBytes, codes += 4 * R) {
      const __m512i packed = load_block<R>(weight);
      Nibbles q = fields<0>(packed);
      RANVIER_ROWS(RANVIER_DOT)
      q = fields<1>(packed);
      codes += 4 * R;
      RANVIER_ROWS(RANVIER_DOT)
    }
  }
  if (blocks % 2 != 0) {
    const Nibbles q = fields<0>(_mm512_loadu_si512(weight));
    RANVIER_ROWS(RANVIER_DOT)
  }
  const Scales scales = load_scales(p, table);
  RANVIER_ROWS(RANVIER_FINISH)
}

constexpr Add kAddTwoBit[kTileRows] = {add_two_bit<1>, add_two_bit<2>,  add_two_bit<3>,  add_two_bit<4>,
                                       add_two_bit<5>, add_two_bit<6>,  add_two_bit<7>,  add_two_bit<8>,
                                       add_two_bit<9>, add_two_bit<10>, add_two_bit<11>, add_two_bit<12>};

}  // namespace

extern "C" void ternary_linear_block_avx512vnni(const SpikeProduct& p, std::int64_t block, std::int64_t first,
                                                std::int64_t last) {
  const TernaryLayout layout(p.format);
  const std::uint8_t* row = p.weight + block * layout.blocks * kBlockBytes;
  for_each_tile(p, block, first, last, [&](std::int64_t rows, std::int64_t m, const std::int8_t* panel, Outputs y) {
    for_each_range(p.format, [&](const WeightRange& w) {
      const Add add = layout.two_bit[w.range] ? kAddTwoBit[rows - 1] : kAddRange[rows - 1];
      add(p, block, m, panel, w, row + layout.begin[w.range] * kBlockBytes, y);
    });
  });
}

}  // namespace ranvier
