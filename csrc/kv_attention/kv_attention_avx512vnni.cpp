// kv_attention, AVX-512 VNNI. A block of 64 tokens is read once and every query of the tile meets it in the first cache. Bytes
// a token and kv head: D + 8 and the salient bits. Operations a token, query and 64 channels: two vpdpbusd for the key and two
// for the value, as queries and weights have two bytes; splitting nibbles runs beside them on the other ports.
#include <immintrin.h>

#include "core/lanes_avx512.h"
#include "kv_attention/kv_softmax.h"

namespace ranvier {
namespace {

// Written as asm because GCC 12 copies, and then spills, the accumulators around the intrinsic.
RANVIER_INLINE void dot(__m512i& acc, __m512i positive, __m512i any) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(positive), "v"(any));
}

RANVIER_INLINE __m512i quad_at(const void* from) {
  std::int32_t value;
  std::memcpy(&value, from, 4);
  return _mm512_set1_epi32(value);
}

RANVIER_INLINE __mmask64 bits_at(const std::uint8_t* from) {
  std::uint64_t value;
  std::memcpy(&value, from, 8);
  return _cvtu64_mask64(value);
}

RANVIER_INLINE __m512i twice_low(__m512i line) { return _mm512_and_si512(_mm512_slli_epi16(line, 1), _mm512_set1_epi8(30)); }
RANVIER_INLINE __m512i twice_high(__m512i line) { return _mm512_and_si512(_mm512_srli_epi16(line, 3), _mm512_set1_epi8(30)); }

RANVIER_INLINE __m512i with_bits(__m512i codes, const std::uint8_t* bits) {
  return _mm512_mask_add_epi8(codes, bits_at(bits), codes, _mm512_set1_epi8(1));
}

#define RANVIER_FOUR(X) X(0) X(1) X(2) X(3)

// 64 tokens x D channels against both bytes of one query: eight chains of dot products.
RANVIER_INLINE void key_dots_of(const KvFormat& f, const std::uint8_t* block, const std::int8_t* high, const std::int8_t* low,
                                std::int32_t* dots) {
  const std::int64_t lines = f.key_lines(), quads = f.key_quads(), salient_lines = (quads + 1) / 2;
  const std::uint8_t* ahead = block + f.block_bytes();
  const std::uint8_t* bits = block + f.key_bits();
#define RANVIER_START(i) __m512i h##i = _mm512_setzero_si512(), l##i = _mm512_setzero_si512();
  RANVIER_FOUR(RANVIER_START)
#undef RANVIER_START
  std::int64_t line = 0;
  for (; line < salient_lines; ++line) {
    const __m512i he = quad_at(high + 8 * line), le = quad_at(low + 8 * line);
    const __m512i ho = quad_at(high + 8 * line + 4), lo = quad_at(low + 8 * line + 4);
    const bool both = 2 * line + 1 < quads;
#define RANVIER_DOTS(i)                                                                   \
  {                                                                                       \
    const __m512i packed = _mm512_loadu_si512(block + (i * lines + line) * 64);           \
    const __m512i even = with_bits(twice_low(packed), bits + (i * quads + 2 * line) * 8); \
    __m512i odd = twice_high(packed);                                                     \
    if (both) odd = with_bits(odd, bits + (i * quads + 2 * line + 1) * 8);                \
    dot(h##i, even, he);                                                                  \
    dot(l##i, even, le);                                                                  \
    dot(h##i, odd, ho);                                                                   \
    dot(l##i, odd, lo);                                                                   \
  }
    RANVIER_FOUR(RANVIER_DOTS)
#undef RANVIER_DOTS
  }
  for (; line < lines; ++line) {
    const __m512i he = quad_at(high + 8 * line), le = quad_at(low + 8 * line);
    const __m512i ho = quad_at(high + 8 * line + 4), lo = quad_at(low + 8 * line + 4);
#define RANVIER_DOTS(i)                                                                        \
  {                                                                                            \
    const __m512i packed = _mm512_loadu_si512(block + (i * lines + line) * 64);                \
    _mm_prefetch(reinterpret_cast<const char*>(ahead + (i * lines + line) * 64), _MM_HINT_T0); \
    const __m512i even = twice_low(packed), odd = twice_high(packed);                          \
    dot(h##i, even, he);                                                                       \
    dot(l##i, even, le);                                                                       \
    dot(h##i, odd, ho);                                                                        \
    dot(l##i, odd, lo);                                                                        \
  }
    RANVIER_FOUR(RANVIER_DOTS)
#undef RANVIER_DOTS
  }
#define RANVIER_FINISH(i) _mm512_store_si512(dots + 16 * i, _mm512_add_epi32(_mm512_slli_epi32(h##i, 8), l##i));
  RANVIER_FOUR(RANVIER_FINISH)
#undef RANVIER_FINISH
}

RANVIER_INLINE void add_sums(float* out, __m512 step, __m512i high, __m512i low) {
  const __m512 sums = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  _mm512_storeu_ps(out, _mm512_fmadd_ps(step, sums, _mm512_loadu_ps(out)));
}

// N lines, 32 N channels, from the n-th on: two bytes of weight against 64 tokens. With bits one line at a time: of more
// GCC 12 spills some.
template <int N, bool Bits>
RANVIER_INLINE void value_dots(const KvFormat& f, const std::uint8_t* block, std::int64_t n, const std::uint8_t* high,
                               const std::uint8_t* low, float step, float* out) {
  const std::int64_t lines = f.value_lines(), groups = f.value_groups(), bytes = f.block_bytes();
  const std::uint8_t* codes = block + f.value_codes() + n * 64;
  const std::uint8_t* bits = block + f.value_bits() + 2 * n * 8;
  const std::int64_t salient = groups - 2 * n;  // of this run's groups
#define RANVIER_START(i) __m512i ah##i = _mm512_setzero_si512(), al##i = ah##i, bh##i = ah##i, bl##i = ah##i;
  RANVIER_FOUR(RANVIER_START)
#undef RANVIER_START
#pragma GCC unroll 1
  for (std::int64_t quad = 0; quad < 16; ++quad, codes += lines * 64, bits += groups * 8) {
    const __m512i wh = quad_at(high + 4 * quad), wl = quad_at(low + 4 * quad);
#define RANVIER_DOTS(i)                                                               \
  if constexpr (N > i) {                                                              \
    const __m512i packed = _mm512_loadu_si512(codes + i * 64);                        \
    _mm_prefetch(reinterpret_cast<const char*>(codes + bytes + i * 64), _MM_HINT_T0); \
    __m512i even = twice_low(packed), odd = twice_high(packed);                       \
    if (Bits && 2 * i < salient) even = with_bits(even, bits + 2 * i * 8);            \
    if (Bits && 2 * i + 1 < salient) odd = with_bits(odd, bits + (2 * i + 1) * 8);    \
    dot(ah##i, wh, even);                                                             \
    dot(al##i, wl, even);                                                             \
    dot(bh##i, wh, odd);                                                              \
    dot(bl##i, wl, odd);                                                              \
  }
    RANVIER_FOUR(RANVIER_DOTS)
#undef RANVIER_DOTS
  }
  const __m512 unit = _mm512_set1_ps(step);
#define RANVIER_FINISH(i)                                  \
  if constexpr (N > i) {                                   \
    add_sums(out + 32 * (n + i), unit, ah##i, al##i);      \
    add_sums(out + 32 * (n + i) + 16, unit, bh##i, bl##i); \
  }
  RANVIER_FOUR(RANVIER_FINISH)
#undef RANVIER_FINISH
}

struct Lanes : FloatLanes {
  using I = __m512i;

  static RANVIER_INLINE I load_int(const std::int32_t* a) { return _mm512_loadu_si512(a); }
  static RANVIER_INLINE F from_half(const std::uint16_t* a) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  }
  static RANVIER_INLINE F from_int(I a) { return _mm512_cvtepi32_ps(a); }
  static RANVIER_INLINE void store_bytes(std::uint8_t* high, std::uint8_t* low, F a) {
    const __m512i whole = _mm512_cvtps_epi32(a);
    _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
    _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
  }
  static RANVIER_INLINE void key_dots(const KvFormat& f, const std::uint8_t* block, const std::int8_t* high,
                                      const std::int8_t* low, std::int32_t* dots) {
    key_dots_of(f, block, high, low, dots);
  }
  static RANVIER_INLINE void add_values(const KvFormat& f, const std::uint8_t* block, const std::uint8_t* high,
                                        const std::uint8_t* low, float step, float* out) {
    const std::int64_t lines = f.value_lines(), salient_lines = (f.value_groups() + 1) / 2;
    std::int64_t n = 0;
    for (; n < salient_lines; ++n) value_dots<1, true>(f, block, n, high, low, step, out);
    for (; n + 4 <= lines; n += 4) value_dots<4, false>(f, block, n, high, low, step, out);
    for (; n + 2 <= lines; n += 2) value_dots<2, false>(f, block, n, high, low, step, out);
    if (n < lines) value_dots<1, false>(f, block, n, high, low, step, out);
  }
};

}  // namespace

extern "C" void kv_attention_chunk_avx512vnni(const KvChunk& chunk, const KvQuery* queries, std::int64_t count,
                                              KvPartial* partials) {
  attend_chunk<Lanes>(chunk, queries, count, partials);
}

}  // namespace ranvier
