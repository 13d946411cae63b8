// kv_attention, AVX2 + FMA + F16C: 16 lanes in two registers, dot products by vpmaddubsw (products of 30 x 128 and 255 x 30,
// so that a pair stays within int16) and vpmaddwd.
#include <immintrin.h>

#include "core/lanes_avx2.h"
#include "kv_attention/kv_softmax.h"

namespace ranvier {
namespace {

struct Ints {
  __m256i a, b;
};

RANVIER_INLINE __m256i quad_at(const void* from) {
  std::int32_t value;
  std::memcpy(&value, from, 4);
  return _mm256_set1_epi32(value);
}

RANVIER_INLINE __m256i load32(const std::uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

RANVIER_INLINE __m256i twice_low(__m256i line) { return _mm256_and_si256(_mm256_slli_epi16(line, 1), _mm256_set1_epi8(30)); }
RANVIER_INLINE __m256i twice_high(__m256i line) { return _mm256_and_si256(_mm256_srli_epi16(line, 3), _mm256_set1_epi8(30)); }

// Adds the 32 bits at `bits` to the 32 codes.
RANVIER_INLINE __m256i with_bits(__m256i codes, const std::uint8_t* bits) {
  const __m256i spread = _mm256_shuffle_epi8(quad_at(bits), _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2,
                                                                             2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i one_each = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, one_each), one_each);
  return _mm256_sub_epi8(codes, set);
}

RANVIER_INLINE void dot(__m256i& acc, __m256i positive, __m256i any) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(positive, any), _mm256_set1_epi16(1)));
}

RANVIER_INLINE __m256i joined(__m256i high, __m256i low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }

struct Lanes : FloatLanes {
  using I = Ints;

  static RANVIER_INLINE I load_int(const std::int32_t* x) {
    const auto* from = reinterpret_cast<const __m256i*>(x);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  static RANVIER_INLINE F from_half(const std::uint16_t* x) {
    const auto* from = reinterpret_cast<const __m128i*>(x);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
  }
  static RANVIER_INLINE F from_int(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static RANVIER_INLINE void store_bytes(std::uint8_t* high, std::uint8_t* low, F x) {
    alignas(32) std::int32_t whole[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole), _mm256_cvtps_epi32(x.a));
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole + 8), _mm256_cvtps_epi32(x.b));
    for (int i = 0; i < 16; ++i) {
      high[i] = static_cast<std::uint8_t>(whole[i] >> 8);
      low[i] = static_cast<std::uint8_t>(whole[i] & 255);
    }
  }

  // Eight tokens x all channels at a time.
  static RANVIER_INLINE void key_dots(const KvFormat& f, const std::uint8_t* block, const std::int8_t* high,
                                      const std::int8_t* low, std::int32_t* dots) {
    const std::int64_t lines = f.key_lines(), quads = f.key_quads();
    for (std::int64_t eight = 0; eight < 8; ++eight) {
      const std::int64_t group = eight / 2, half = eight % 2;
      const std::uint8_t* codes = block + group * lines * 64 + half * 32;
      const std::uint8_t* bits = block + f.key_bits() + group * quads * 8 + half * 4;
      __m256i h = _mm256_setzero_si256(), l = h;
      for (std::int64_t line = 0; line < lines; ++line) {
        const __m256i packed = load32(codes + line * 64);
        __m256i even = twice_low(packed), odd = twice_high(packed);
        if (2 * line < quads) even = with_bits(even, bits + 2 * line * 8);
        if (2 * line + 1 < quads) odd = with_bits(odd, bits + (2 * line + 1) * 8);
        dot(h, even, quad_at(high + 8 * line));
        dot(l, even, quad_at(low + 8 * line));
        dot(h, odd, quad_at(high + 8 * line + 4));
        dot(l, odd, quad_at(low + 8 * line + 4));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + 8 * eight), joined(h, l));
    }
  }

  static RANVIER_INLINE void add_sums(float* out, __m256 step, __m256i sums) {
    _mm256_storeu_ps(out, _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(sums), _mm256_loadu_ps(out)));
  }

  // Half a line, 2 x 8 channels, against all tokens at a time.
  static RANVIER_INLINE void add_values(const KvFormat& f, const std::uint8_t* block, const std::uint8_t* high,
                                        const std::uint8_t* low, float step, float* out) {
    const std::int64_t lines = f.value_lines(), groups = f.value_groups();
    for (std::int64_t part = 0; part < 2 * lines; ++part) {
      const std::int64_t line = part / 2, half = part % 2;
      const std::uint8_t* codes = block + f.value_codes() + line * 64 + half * 32;
      const std::uint8_t* bits = block + f.value_bits() + 2 * line * 8 + half * 4;
      __m256i ah = _mm256_setzero_si256(), al = ah, bh = ah, bl = ah;
      for (std::int64_t quad = 0; quad < 16; ++quad) {
        const __m256i packed = load32(codes + quad * lines * 64);
        const __m256i wh = quad_at(high + 4 * quad), wl = quad_at(low + 4 * quad);
        __m256i even = twice_low(packed), odd = twice_high(packed);
        if (2 * line < groups) even = with_bits(even, bits + quad * groups * 8);
        if (2 * line + 1 < groups) odd = with_bits(odd, bits + (quad * groups + 1) * 8);
        dot(ah, wh, even);
        dot(al, wl, even);
        dot(bh, wh, odd);
        dot(bl, wl, odd);
      }
      add_sums(out + 32 * line + 8 * half, _mm256_set1_ps(step), joined(ah, al));
      add_sums(out + 32 * line + 16 + 8 * half, _mm256_set1_ps(step), joined(bh, bl));
    }
  }
};

}  // namespace

extern "C" void kv_attention_chunk_avx2(const KvChunk& chunk, const KvQuery* queries, std::int64_t count, KvPartial* partials) {
  attend_chunk<Lanes>(chunk, queries, count, partials);
}

}  // namespace ranvier
