// spike_linear, AVX-512 VNNI. One tile = up to 12 tokens x 32 outputs, 24 accumulators in registers; a 64-byte block of
// nibbles (4 channels x 32 outputs) is loaded and split once (3 operations) and meets every token by a broadcast of its 4 codes.
// Bytes: N K / 2 + M K + M N * size. Operations: one vpdpbusd per token, 4 channels and 16 outputs, its issue rate the bound for
// M > 4; below, the read bandwidth is. The accumulators have names because GCC 12 spills arrays of them.
#include <immintrin.h>

#include "spike_linear/spike_linear_groups.h"

namespace ranvier {
namespace {

constexpr std::int64_t kPrefetch = 16 * kBlockBytes;

#define RANVIER_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

RANVIER_INLINE std::int32_t load32(const void* from) {
  std::int32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

// Written as asm because GCC 12 copies, and then spills, the accumulators around the intrinsic.
RANVIER_INLINE void dot(__m512i& acc, __m512i weight, __m512i codes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weight), "v"(codes));
}

struct Nibbles {
  __m512i low, high;
};

RANVIER_INLINE Nibbles unpack(const std::uint8_t* weight) {
  const __m512i packed = _mm512_loadu_si512(weight), mask = _mm512_set1_epi8(15);
  _mm_prefetch(reinterpret_cast<const char*>(weight + kPrefetch), _MM_HINT_T0);
  return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
}

// What the 32 outputs of a block bring along for one group.
struct GroupTable {
  __m512i minus_zero_low, minus_zero_high;
  __m512 scale_low, scale_high, sum_low, sum_high;
};

RANVIER_INLINE GroupTable load_table(const SpikeProduct& p, std::int64_t table) {
  GroupTable t;
  const __m128i* zero = reinterpret_cast<const __m128i*>(p.weight_zero + table);
  t.minus_zero_low = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(_mm_loadu_si128(zero)));
  t.minus_zero_high = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(_mm_loadu_si128(zero + 1)));
  t.scale_low = _mm512_loadu_ps(p.weight_scale + table);
  t.scale_high = _mm512_loadu_ps(p.weight_scale + table + 16);
  t.sum_low = t.sum_high = _mm512_setzero_ps();
  if (p.zero != nullptr) {
    t.sum_low = _mm512_cvtepi32_ps(_mm512_loadu_si512(p.weight_sum + table));
    t.sum_high = _mm512_cvtepi32_ps(_mm512_loadu_si512(p.weight_sum + table + 16));
  }
  return t;
}

// acc - z_x * S: what the weight scale multiplies.
RANVIER_INLINE __m512 product_of(const SpikeProduct& p, std::int64_t at, __m512i acc, __m512 sum) {
  const __m512 v = _mm512_cvtepi32_ps(acc);
  return p.zero == nullptr ? v : _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(p.zero[at])), sum, v);
}

// One token: two blocks a step keep four chains of dot products in flight.
RANVIER_INLINE void dot_one(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t blocks, __m512i& a, __m512i& b) {
  __m512i a1 = _mm512_setzero_si512(), b1 = _mm512_setzero_si512();
  std::int64_t k = 0;
  for (; k + 2 <= blocks; k += 2) {
    const Nibbles even = unpack(weight + k * kBlockBytes), odd = unpack(weight + (k + 1) * kBlockBytes);
    const __m512i c0 = _mm512_set1_epi32(load32(codes + 4 * k)), c1 = _mm512_set1_epi32(load32(codes + 4 * k + 4));
    dot(a, even.low, c0);
    dot(b, even.high, c0);
    dot(a1, odd.low, c1);
    dot(b1, odd.high, c1);
  }
  if (k < blocks) {
    const Nibbles last = unpack(weight + k * kBlockBytes);
    const __m512i c = _mm512_set1_epi32(load32(codes + 4 * k));
    dot(a, last.low, c);
    dot(b, last.high, c);
  }
  a = _mm512_add_epi32(a, a1);
  b = _mm512_add_epi32(b, b1);
}

// One group of a tile. t, the range's sum so far, grows by s_w * v; after its last group y grows by s_x * t. All levels
// round alike: this order and these fused operations are fixed.
template <int R>
RANVIER_INLINE void group(const SpikeProduct& p, std::int64_t block, std::int64_t m, const std::int8_t* panel,
                          const WeightGroup& g, float (*t)[kOutputBlock], float (*y)[kOutputBlock]) {
  const std::int64_t groups = p.format.group_count();
  const GroupTable table = load_table(p, (block * groups + g.index) * kOutputBlock);
  const std::uint8_t* weight = p.weight + (block * p.format.block_count() + g.begin) * kBlockBytes;
  const std::int8_t* codes = panel + g.begin * 4 * R;
#define RANVIER_START(i)                                               \
  __m512i a##i{}, b##i{};                                              \
  if constexpr (R > i) {                                               \
    const __m512i sum = _mm512_set1_epi32(p.sums[(m + i) * groups + g.index]); \
    a##i = _mm512_mullo_epi32(sum, table.minus_zero_low);              \
    b##i = _mm512_mullo_epi32(sum, table.minus_zero_high);             \
  }
  RANVIER_ROWS(RANVIER_START)
#undef RANVIER_START
  if constexpr (R == 1) {
    dot_one(weight, codes, g.end - g.begin, a0, b0);
  } else {
    for (std::int64_t k = g.begin; k < g.end; ++k, weight += kBlockBytes, codes += 4 * R) {
      const Nibbles w = unpack(weight);
#define RANVIER_DOT(i)                                          \
  if constexpr (R > i) {                                        \
    const __m512i c = _mm512_set1_epi32(load32(codes + 4 * i)); \
    dot(a##i, w.low, c);                                        \
    dot(b##i, w.high, c);                                       \
  }
      RANVIER_ROWS(RANVIER_DOT)
#undef RANVIER_DOT
    }
  }
  // A range's first group finds no sum: its lanes are masked to zero.
  const __mmask16 have = g.first ? __mmask16{0} : static_cast<__mmask16>(0xffff);
  const std::int64_t first = m * p.format.ranges + g.range, step = p.format.ranges;
#define RANVIER_SUM(i, acc, half, from) \
  _mm512_fmadd_ps(table.scale_##half, product_of(p, first + i * step, acc, table.sum_##half), _mm512_maskz_load_ps(have, from))
#define RANVIER_ADD(i)                                                    \
  if constexpr (R > i) {                                                  \
    _mm512_store_ps(t[i], RANVIER_SUM(i, a##i, low, t[i]));               \
    _mm512_store_ps(t[i] + 16, RANVIER_SUM(i, b##i, high, t[i] + 16));    \
  }
#define RANVIER_FINISH(i)                                                                                    \
  if constexpr (R > i) {                                                                                     \
    const __m512 scale = _mm512_set1_ps(p.scale[first + i * step]);                                          \
    const __m512 low = RANVIER_SUM(i, a##i, low, t[i]), high = RANVIER_SUM(i, b##i, high, t[i] + 16);        \
    _mm512_store_ps(y[i], _mm512_fmadd_ps(scale, low, _mm512_load_ps(y[i])));                                \
    _mm512_store_ps(y[i] + 16, _mm512_fmadd_ps(scale, high, _mm512_load_ps(y[i] + 16)));                     \
  }
  if (g.last) {
    RANVIER_ROWS(RANVIER_FINISH)
  } else {
    RANVIER_ROWS(RANVIER_ADD)
  }
#undef RANVIER_SUM
#undef RANVIER_ADD
#undef RANVIER_FINISH
}

__mmask16 lanes_of(std::int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1u);
}

__m512 load_bias(const SpikeProduct& p, std::int64_t n, __mmask16 lanes) {
  if (p.bias == nullptr) return _mm512_setzero_ps();
  if (p.bias_dtype == DType::float32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(p.bias) + n);
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const std::uint16_t*>(p.bias) + n);
  if (p.bias_dtype == DType::float16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// float32 to bfloat16 by integers: vcvtneps2bf16 flushes subnormals and belongs to another level.
__m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet));
}

void store(const SpikeProduct& p, std::int64_t at, __mmask16 lanes, __m512 v) {
  if (p.y_dtype == DType::float32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p.y) + at, lanes, v);
  } else {
    const __m256i half = p.y_dtype == DType::bfloat16
                             ? to_bf16(v)
                             : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(p.y) + at, lanes, half);
  }
}

template <int R>
void tile(const SpikeProduct& p, std::int64_t block, std::int64_t m) {
  const std::int64_t n = block * kOutputBlock;
  const __mmask16 lanes[2] = {lanes_of(p.N - n), lanes_of(p.N - n - 16)};
  alignas(64) float t[R][kOutputBlock], y[R][kOutputBlock];
  for (int half = 0; half < 2; ++half) {
    const __m512 bias = load_bias(p, n + 16 * half, lanes[half]);
    for (int i = 0; i < R; ++i) _mm512_store_ps(y[i] + 16 * half, bias);
  }
  const std::int8_t* panel = p.panels + m * 4 * p.format.block_count();
  for_each_weight_group(p.format, [&](const WeightGroup& g) { group<R>(p, block, m, panel, g, t, y); });
  for (int i = 0; i < R; ++i) {
    const std::int64_t at = (m + i) * p.N + n;
    store(p, at, lanes[0], _mm512_load_ps(y[i]));
    if (lanes[1]) store(p, at + 16, lanes[1], _mm512_load_ps(y[i] + 16));
  }
}

using Tile = void (*)(const SpikeProduct&, std::int64_t, std::int64_t);
constexpr Tile kTiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                                    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

}  // namespace

extern "C" void spike_linear_block_avx512vnni(const SpikeProduct& p, std::int64_t block, std::int64_t first,
                                              std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    const std::int64_t begin = p.tile_begin(t);
    kTiles[p.tile_begin(t + 1) - begin - 1](p, block, begin);
  }
}

}  // namespace ranvier
