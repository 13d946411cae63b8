// ternary_linear, AVX2 + FMA + F16C. A pair of products is at most 2 * 3 * max|code| in int16: with 8-bit codes 43 blocks of
// four channels fit before the sums are widened, so a block of eight is split once for two of them.
#include "spike_linear/spike_linear_avx2.h"
#include "ternary_linear/ternary_linear.h"

namespace ranvier {
namespace {

// The four 2-bit fields of a byte, in two halves: channels 0-3 and 4-7 of the block, each for outputs i and 16 + i.
struct Fields {
  __m256i low, high;
};

RANVIER_INLINE Fields first_half(__m256i packed) {
  const __m256i mask = _mm256_set1_epi8(3);
  return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask)};
}

RANVIER_INLINE Fields second_half(__m256i packed) {
  const __m256i mask = _mm256_set1_epi8(3);
  return {_mm256_and_si256(_mm256_srli_epi16(packed, 4), mask), _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask)};
}

RANVIER_INLINE __m256i four_codes(const std::int8_t* codes) {
  std::int32_t four;
  std::memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

#define RANVIER_START(i) __m256i a##i = _mm256_setzero_si256(), b##i = _mm256_setzero_si256();
#define RANVIER_DOT(i)                          \
  if constexpr (R > i) {                        \
    const __m256i c = four_codes(at + 4 * i);   \
    add(a##i, _mm256_maddubs_epi16(q.low, c));  \
    add(b##i, _mm256_maddubs_epi16(q.high, c)); \
  }
#define RANVIER_WIDEN(i)                                                                                \
  if constexpr (R > i) {                                                                                \
    __m256i* low = reinterpret_cast<__m256i*>(acc[i]);                                                  \
    __m256i* high = reinterpret_cast<__m256i*>(acc[i] + 16);                                            \
    _mm256_store_si256(low, _mm256_add_epi32(_mm256_load_si256(low), _mm256_madd_epi16(a##i, ones)));   \
    _mm256_store_si256(high, _mm256_add_epi32(_mm256_load_si256(high), _mm256_madd_epi16(b##i, ones))); \
  }

// acc[i][0..7] and [16..23] (half 0) or [8..15] and [24..31] (half 1) += c * q over the blocks of four channels
template <int R>
__attribute__((noinline)) void dot_two_bit(const std::uint8_t* weight, const std::int8_t* codes, std::int64_t stride,
                                           std::int64_t blocks, std::int64_t window, std::int32_t (*acc)[kOutputBlock]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const std::int64_t pairs = blocks / 2, pair_window = window / 2;
  for (std::int64_t k = 0; k < pairs;) {
    const std::int64_t stop = pairs - k < pair_window ? pairs : k + pair_window;
    RANVIER_ROWS(RANVIER_START)
    for (; k < stop; ++k) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k * kBlockBytes));
      _mm_prefetch(reinterpret_cast<const char*>(weight + (k + 16) * kBlockBytes), _MM_HINT_T0);
      const std::int8_t* at = codes + 2 * k * stride;
      Fields q = first_half(packed);
      RANVIER_ROWS(RANVIER_DOT)
      q = second_half(packed);
      at += stride;
      RANVIER_ROWS(RANVIER_DOT)
    }
    RANVIER_ROWS(RANVIER_WIDEN)
  }
  if (blocks % 2 != 0) {
    RANVIER_ROWS(RANVIER_START)
    const Fields q = first_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + pairs * kBlockBytes)));
    const std::int8_t* at = codes + 2 * pairs * stride;
    RANVIER_ROWS(RANVIER_DOT)
    RANVIER_ROWS(RANVIER_WIDEN)
  }
}

#undef RANVIER_START
#undef RANVIER_DOT
#undef RANVIER_WIDEN

template <int R>
void ternary_rows(const SpikeProduct& p, const TernaryLayout& layout, std::int64_t block, std::int64_t m,
                  const std::int8_t* codes, std::int64_t stride) {
  const SpikeFormat& f = p.format;
  const std::uint8_t* row = p.weight + block * layout.blocks * kBlockBytes;
  const std::int64_t bits_window = window_of(f, 0, kTwoBitTop), nibbles_window = window_of(f, 0, kNibbleTop);
  rows<R>(p, block, m, [&](std::int64_t range, std::int64_t begin, std::int64_t end, std::int32_t (*acc)[kOutputBlock]) {
    const std::uint8_t* weight = row + layout.begin[range] * kBlockBytes;
    const std::int8_t* from = codes + begin * stride;
    if (!layout.two_bit[range]) return accumulate<R>(weight, from, stride, end - begin, nibbles_window, acc);
    for (int half = 0; half < 2; ++half) {
      auto* outputs = reinterpret_cast<std::int32_t (*)[kOutputBlock]>(acc[0] + 8 * half);
      dot_two_bit<R>(weight + 32 * half, from, stride, end - begin, bits_window, outputs);
    }
  });
}

}  // namespace

extern "C" void ternary_linear_block_avx2(const SpikeProduct& p, std::int64_t block, std::int64_t first, std::int64_t last) {
  const TernaryLayout layout(p.format);
  for_each_step(p, first, last, [&](std::int64_t count, std::int64_t m, const std::int8_t* codes, std::int64_t stride) {
    switch (count) {
      case 4: ternary_rows<4>(p, layout, block, m, codes, stride); break;
      case 3: ternary_rows<3>(p, layout, block, m, codes, stride); break;
      case 2: ternary_rows<2>(p, layout, block, m, codes, stride); break;
      default: ternary_rows<1>(p, layout, block, m, codes, stride); break;
    }
  });
}

}  // namespace ranvier
