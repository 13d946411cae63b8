// What the AVX-512 VNNI kernels of packed weights share: the dot product, blocks of nibbles, a range of one group, bias and
// store (internal linkage, see core/numeric.h). Accumulators have names because GCC 12 spills arrays of them.
#pragma once

#include <immintrin.h>

#include "spike_linear/spike_linear_groups.h"

namespace ranvier {
namespace {

#define RANVIER_GROUP_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define RANVIER_ROWS(X) RANVIER_GROUP_ROWS(X) X(8) X(9) X(10) X(11)

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

// Near suits weights that lie in L2, and one token, which asks for memory fast enough by itself. With a few tokens a block
// takes longer, and its line is wanted in L2 well before it is in L1.
template <bool Near>
RANVIER_INLINE Nibbles unpack(const std::uint8_t* weight) {
  const __m512i packed = _mm512_loadu_si512(weight), mask = _mm512_set1_epi8(15);
  const char* from = reinterpret_cast<const char*>(weight);
  if constexpr (Near) {
    _mm_prefetch(from + 16 * kBlockBytes, _MM_HINT_T0);
  } else {
    _mm_prefetch(from + 64 * kBlockBytes, _MM_HINT_T1);
    _mm_prefetch(from + 8 * kBlockBytes, _MM_HINT_T0);
  }
  return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
}

// What the 32 outputs of a block bring along for one group: outputs 0-15 are low, 16-31 high.
struct MinusZeros {
  __m512i low, high;
};

RANVIER_INLINE MinusZeros load_minus_zeros(const SpikeProduct& p, std::int64_t table) {
  const __m128i* zero = reinterpret_cast<const __m128i*>(p.weight_zero + table);
  return {_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(_mm_loadu_si128(zero))),
          _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(_mm_loadu_si128(zero + 1)))};
}

struct Scales {
  __m512 low, high, sum_low, sum_high;
};

RANVIER_INLINE Scales load_scales(const SpikeProduct& p, std::int64_t table) {
  const __m512 none = _mm512_setzero_ps();
  Scales s{_mm512_loadu_ps(p.weight_scale + table), _mm512_loadu_ps(p.weight_scale + table + 16), none, none};
  if (p.zero != nullptr) {
    s.sum_low = _mm512_cvtepi32_ps(_mm512_loadu_si512(p.weight_sum + table));
    s.sum_high = _mm512_cvtepi32_ps(_mm512_loadu_si512(p.weight_sum + table + 16));
  }
  return s;
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
    const Nibbles even = unpack<true>(weight + k * kBlockBytes), odd = unpack<true>(weight + (k + 1) * kBlockBytes);
    const __m512i c0 = _mm512_set1_epi32(load32(codes + 4 * k)), c1 = _mm512_set1_epi32(load32(codes + 4 * k + 4));
    dot(a, even.low, c0);
    dot(b, even.high, c0);
    dot(a1, odd.low, c1);
    dot(b1, odd.high, c1);
  }
  if (k < blocks) {
    const Nibbles last = unpack<true>(weight + k * kBlockBytes);
    const __m512i c = _mm512_set1_epi32(load32(codes + 4 * k));
    dot(a, last.low, c);
    dot(b, last.high, c);
  }
  a = _mm512_add_epi32(a, a1);
  b = _mm512_add_epi32(b, b1);
}

// The integer sums of R tokens over one group `index`: a##i and b##i start at -z_w sum(c) and end as sum c (q - z_w).
#define RANVIER_START(i)                                                     \
  __m512i a##i{}, b##i{};                                                    \
  if constexpr (R > i) {                                                     \
    const __m512i sum = _mm512_set1_epi32(p.sums[(m + i) * groups + index]); \
    a##i = _mm512_mullo_epi32(sum, minus_zeros.low);                         \
    b##i = _mm512_mullo_epi32(sum, minus_zeros.high);                        \
  }
#define RANVIER_DOT(i)                                          \
  if constexpr (R > i) {                                        \
    const __m512i c = _mm512_set1_epi32(load32(codes + 4 * i)); \
    dot(a##i, q.low, c);                                        \
    dot(b##i, q.high, c);                                       \
  }
// The sums over blocks [begin, end) of nibbles, the first of them at `from`. The scales are loaded once the registers of the
// loop are free.
#define RANVIER_DOTS(ROWS)                                                              \
  const std::int64_t table = (block * groups + index) * kOutputBlock;                   \
  const MinusZeros minus_zeros = load_minus_zeros(p, table);                            \
  const std::uint8_t* weight = from;                                                    \
  const std::int8_t* codes = panel + begin * 4 * R;                                     \
  ROWS(RANVIER_START)                                                                   \
  if constexpr (R == 1) {                                                               \
    dot_one(weight, codes, end - begin, a0, b0);                                        \
  } else {                                                                              \
    for (std::int64_t k = begin; k < end; ++k, weight += kBlockBytes, codes += 4 * R) { \
      const Nibbles q = unpack<(R > 8)>(weight);                                        \
      ROWS(RANVIER_DOT)                                                                 \
    }                                                                                   \
  }                                                                                     \
  const Scales scales = load_scales(p, table);
// y += s_x (s_w v) for a range that is one group. All levels round alike: the order of these operations, and which of them are
// fused, is fixed.
#define RANVIER_FINISH(i)                                                                     \
  if constexpr (R > i) {                                                                      \
    const std::int64_t at = (m + i) * ranges + w.range;                                       \
    const __m512 scale = _mm512_set1_ps(p.scale[at]);                                         \
    const __m512 low = _mm512_mul_ps(scales.low, product_of(p, at, a##i, scales.sum_low));    \
    const __m512 high = _mm512_mul_ps(scales.high, product_of(p, at, b##i, scales.sum_high)); \
    _mm512_store_ps(y[i], _mm512_fmadd_ps(scale, low, _mm512_load_ps(y[i])));                 \
    _mm512_store_ps(y[i] + 16, _mm512_fmadd_ps(scale, high, _mm512_load_ps(y[i] + 16)));      \
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
    const __m256i half =
        p.y_dtype == DType::bfloat16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(p.y) + at, lanes, half);
  }
}

using Outputs = float (*)[kOutputBlock];

void load_bias(const SpikeProduct& p, std::int64_t n, std::int64_t rows, Outputs y) {
  for (int half = 0; half < 2; ++half) {
    const __m512 bias = load_bias(p, n + 16 * half, lanes_of(p.N - n - 16 * half));
    for (std::int64_t i = 0; i < rows; ++i) _mm512_store_ps(y[i] + 16 * half, bias);
  }
}

void store(const SpikeProduct& p, std::int64_t m, std::int64_t n, std::int64_t rows, Outputs y) {
  const __mmask16 low = lanes_of(p.N - n), high = lanes_of(p.N - n - 16);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t at = (m + i) * p.N + n;
    store(p, at, low, _mm512_load_ps(y[i]));
    if (high) store(p, at + 16, high, _mm512_load_ps(y[i] + 16));
  }
}

// Tokens [m, m + R) and a range of nibbles that is one group; its first block lies at `from`.
template <int R>
void add_range(const SpikeProduct& p, std::int64_t block, std::int64_t m, const std::int8_t* panel, const WeightRange& w,
               const std::uint8_t* from, Outputs y) {
  const std::int64_t groups = p.format.group_count(), ranges = p.format.ranges;
  const std::int64_t index = w.index, begin = w.begin, end = w.end;
  RANVIER_DOTS(RANVIER_ROWS)
  RANVIER_ROWS(RANVIER_FINISH)
}

using Add = void (*)(const SpikeProduct&, std::int64_t, std::int64_t, const std::int8_t*, const WeightRange&,
                     const std::uint8_t*, Outputs);
constexpr Add kAddRange[kTileRows] = {add_range<1>, add_range<2>, add_range<3>, add_range<4>,  add_range<5>,  add_range<6>,
                                      add_range<7>, add_range<8>, add_range<9>, add_range<10>, add_range<11>, add_range<12>};

// The tiles [first, last) of 32 outputs: add(rows, m, panel, y) adds up everything but the bias.
template <class AddAll>
RANVIER_INLINE void for_each_tile(const SpikeProduct& p, std::int64_t block, std::int64_t first, std::int64_t last,
                                  const AddAll& add_all) {
  const std::int64_t n = block * kOutputBlock;
  for (std::int64_t t = first; t < last; ++t) {
    const std::int64_t m = p.tile_begin(t), rows = p.tile_begin(t + 1) - m;
    alignas(64) float y[kTileRows][kOutputBlock];
    load_bias(p, n, rows, y);
    add_all(rows, m, p.panels + m * 4 * p.format.block_count(), y);
    store(p, m, n, rows, y);
  }
}

}  // namespace
}  // namespace ranvier
