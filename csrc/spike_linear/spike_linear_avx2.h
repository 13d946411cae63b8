// What the AVX2 kernels of packed weights share: the dot products of nibbles, epilogue and store (internal linkage, see
// core/numeric.h). Half a block (32 bytes: 8 + 8 outputs) meets up to four tokens at a time.
#pragma once

#include <immintrin.h>

#include "spike_linear/spike_linear_groups.h"

namespace ranvier {
namespace {

constexpr int kRows = 4;

#define RANVIER_ROWS(X) X(0) X(1) X(2) X(3)

// How many blocks fit into int16 sums: a pair of products is at most 2 * top * max|code|.
RANVIER_INLINE std::int64_t window_of(const SpikeFormat& f, std::int64_t range, std::int64_t top) {
  return 32767 / (2 * top * f.code_bound(range));
}

// Written as asm because GCC 12 copies, and then spills, the accumulators around the intrinsic.
RANVIER_INLINE void add(__m256i& acc, __m256i pairs) { __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(pairs)); }

// Not inlined: what the caller keeps in registers would push the accumulators out of them.
// acc[i][0..7] and [16..23] (half 0) or [8..15] and [24..31] (half 1) += c * q over the blocks
template <int R>
__attribute__((noinline)) void dot(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride,
                                   std::int64_t blocks, std::int64_t window, std::int32_t (*acc)[kOutputBlock]) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (std::int64_t k = 0; k < blocks;) {
    const std::int64_t stop = blocks - k < window ? blocks : k + window;
#define RANVIER_START(i) __m256i a##i = _mm256_setzero_si256(), b##i = _mm256_setzero_si256();
    RANVIER_ROWS(RANVIER_START)
#undef RANVIER_START
    for (; k < stop; ++k) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k * kBlockBytes));
      _mm_prefetch(reinterpret_cast<const char*>(weight + k * kBlockBytes + 16 * kBlockBytes), _MM_HINT_T0);
      const __m256i low = _mm256_and_si256(packed, nibble), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
#define RANVIER_DOT(i)                                 \
  if constexpr (R > i) {                               \
    std::int32_t four;                                 \
    std::memcpy(&four, codes + k * stride + 4 * i, 4); \
    const __m256i c = _mm256_set1_epi32(four);         \
    add(a##i, _mm256_maddubs_epi16(low, c));           \
    add(b##i, _mm256_maddubs_epi16(high, c));          \
  }
      RANVIER_ROWS(RANVIER_DOT)
#undef RANVIER_DOT
    }
#define RANVIER_WIDEN(i)                                                                                \
  if constexpr (R > i) {                                                                                \
    __m256i* low = reinterpret_cast<__m256i*>(acc[i]);                                                  \
    __m256i* high = reinterpret_cast<__m256i*>(acc[i] + 16);                                            \
    _mm256_store_si256(low, _mm256_add_epi32(_mm256_load_si256(low), _mm256_madd_epi16(a##i, ones)));   \
    _mm256_store_si256(high, _mm256_add_epi32(_mm256_load_si256(high), _mm256_madd_epi16(b##i, ones))); \
  }
    RANVIER_ROWS(RANVIER_WIDEN)
#undef RANVIER_WIDEN
  }
}

// One token reads whole blocks: the stream from memory stays sequential.
__attribute__((noinline)) void dot_one(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride,
                                       std::int64_t blocks, std::int64_t window, std::int32_t* acc) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i* sums = reinterpret_cast<__m256i*>(acc);
  for (std::int64_t k = 0; k < blocks;) {
    const std::int64_t stop = blocks - k < window ? blocks : k + window;
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, b0 = a0, b1 = a0;
    for (; k < stop; ++k) {
      const __m256i* from = reinterpret_cast<const __m256i*>(weight + k * kBlockBytes);
      _mm_prefetch(reinterpret_cast<const char*>(from) + 16 * kBlockBytes, _MM_HINT_T0);
      const __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
      std::int32_t four;
      std::memcpy(&four, codes + k * stride, 4);
      const __m256i c = _mm256_set1_epi32(four);
      a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(first, nibble), c));
      a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(second, nibble), c));
      b0 = _mm256_add_epi16(b0, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(first, 4), nibble), c));
      b1 = _mm256_add_epi16(b1, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(second, 4), nibble), c));
    }
    const __m256i part[4] = {a0, a1, b0, b1};
    for (int i = 0; i < 4; ++i) {
      _mm256_store_si256(sums + i, _mm256_add_epi32(_mm256_load_si256(sums + i), _mm256_madd_epi16(part[i], ones)));
    }
  }
}

template <int R>
void accumulate(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride, std::int64_t blocks,
                std::int64_t window, std::int32_t (*acc)[kOutputBlock]) {
  if constexpr (R == 1) {
    dot_one(weight, codes, stride, blocks, window, acc[0]);
  } else {
    for (int half = 0; half < 2; ++half) {
      dot<R>(weight + 32 * half, codes, stride, blocks, window,
             reinterpret_cast<std::int32_t (*)[kOutputBlock]>(acc[0] + 8 * half));
    }
  }
}

// t += s_w (acc - z_x S), one token's outputs of one group.
void add_group(const SpikeProduct& p, std::int64_t at, std::int32_t code_sum, std::int64_t table, const std::int32_t* acc,
               float* t) {
  const __m256i sum = _mm256_set1_epi32(code_sum);
  for (int j = 0; j < kOutputBlock; j += 8) {
    const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.weight_zero + table + j)));
    const __m256i whole =
        _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + j)), _mm256_mullo_epi32(zero, sum));
    __m256 v = _mm256_cvtepi32_ps(whole);
    if (p.zero != nullptr) {
      const __m256i weight_sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.weight_sum + table + j));
      v = _mm256_fnmadd_ps(_mm256_set1_ps(static_cast<float>(p.zero[at])), _mm256_cvtepi32_ps(weight_sum), v);
    }
    _mm256_store_ps(t + j, _mm256_fmadd_ps(_mm256_loadu_ps(p.weight_scale + table + j), v, _mm256_load_ps(t + j)));
  }
}

// y += s_x t
void add_range(float scale, const float* t, float* y) {
  for (int j = 0; j < kOutputBlock; j += 8) {
    _mm256_store_ps(y + j, _mm256_fmadd_ps(_mm256_set1_ps(scale), _mm256_load_ps(t + j), _mm256_load_ps(y + j)));
  }
}

void store(const SpikeProduct& p, std::int64_t m, std::int64_t n, std::int64_t width, const float* y) {
  std::int64_t j = 0;
  if (p.y_dtype == DType::float32) {
    std::memcpy(static_cast<float*>(p.y) + m * p.N + n, y, static_cast<std::size_t>(width) * 4);
    return;
  }
  if (p.y_dtype == DType::float16) {
    for (; j + 8 <= width; j += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_load_ps(y + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(p.y) + m * p.N + n + j), half);
    }
  }
  for (; j < width; ++j) store_float(p.y, m * p.N + n + j, p.y_dtype, y[j]);
}

// Tokens [m, m + R); accumulate(range, first block, one past the last, sums) adds a group's integer products.
template <int R, class Accumulate>
RANVIER_INLINE void rows(const SpikeProduct& p, std::int64_t block, std::int64_t m, const Accumulate& accumulate) {
  const SpikeFormat& f = p.format;
  const std::int64_t n = block * kOutputBlock, width = p.N - n < kOutputBlock ? p.N - n : kOutputBlock;
  alignas(32) float y[R][kOutputBlock];
  for (std::int64_t j = 0; j < kOutputBlock; ++j) {
    y[0][j] = p.bias != nullptr && j < width ? load_float(p.bias, n + j, p.bias_dtype) : 0.0f;
  }
  for (int i = 1; i < R; ++i) std::memcpy(y[i], y[0], sizeof(y[0]));
  const std::int64_t groups = f.group_count();
  for_each_range(f, [&](const WeightRange& w) {
    alignas(32) float t[R][kOutputBlock] = {};
    const std::int64_t at = m * f.ranges + w.range;
    for_each_group(w, [&](std::int64_t g, std::int64_t begin, std::int64_t end) {
      alignas(32) std::int32_t acc[R][kOutputBlock] = {};
      accumulate(w.range, begin, end, acc);
      const std::int64_t table = (block * groups + g) * kOutputBlock;
      for (int i = 0; i < R; ++i) add_group(p, at + i * f.ranges, p.sums[(m + i) * groups + g], table, acc[i], t[i]);
    });
    for (int i = 0; i < R; ++i) add_range(p.scale[at + i * f.ranges], t[i], y[i]);
  });
  for (int i = 0; i < R; ++i) store(p, m + i, n, width, y[i]);
}

// The tiles [first, last) in steps of four tokens: step(number of tokens, first token, its codes, stride of a block's codes).
template <class Step>
RANVIER_INLINE void for_each_step(const SpikeProduct& p, std::int64_t first, std::int64_t last, const Step& step) {
  const std::int64_t row_bytes = 4 * p.format.block_count();
  for (std::int64_t t = first; t < last; ++t) {
    const std::int64_t begin = p.tile_begin(t), count = p.tile_begin(t + 1) - begin;
    const std::int8_t* panel = p.panels + begin * row_bytes;
    for (std::int64_t i = 0; i < count; i += kRows) {
      step(count - i < kRows ? count - i : kRows, begin + i, panel + 4 * i, 4 * count);
    }
  }
}

}  // namespace
}  // namespace ranvier
