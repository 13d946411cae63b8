// spike_encode, AVX-512 (F, BW, DQ, VL). A token is read twice, the second time from L1, and its codes written once:
// 2 x 4 bytes read and 1 written per channel, one true division per 16 channels, which is what bounds it.
#include <immintrin.h>

#include "spike_encode/spike_quantizer.h"

namespace ranvier {
namespace {

__mmask16 lanes_from(std::int64_t k, std::int64_t K) {
  return K - k >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (K - k)) - 1u);
}

template <DType D>
__m512 load(const void* x, std::int64_t k, __mmask16 lanes) {
  if constexpr (D == DType::float32) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + k);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const std::uint16_t*>(x) + k);
    if constexpr (D == DType::float16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

__mmask16 salient_lanes(const std::uint8_t* mask, std::int64_t k, __mmask16 lanes) {
  if (mask == nullptr) return 0;
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, mask + k);
  return _mm_test_epi8_mask(bytes, bytes);
}

template <DType D>
TokenExtremes extremes(const SpikeFormat& f, const SpikeRow& row) {
  const float inf = __builtin_inff();
  __m512 low_min = _mm512_set1_ps(f.compat ? inf : 0.0f), low_max = _mm512_set1_ps(f.compat ? -inf : 0.0f);
  __m512i magnitude = _mm512_setzero_si512(), salient_max = _mm512_setzero_si512();
  const __m512i unsigned_bits = _mm512_set1_epi32(0x7fffffff);
  for (std::int64_t k = 0; k < f.K; k += 16) {
    const __mmask16 lanes = lanes_from(k, f.K);
    const __m512 x = load<D>(row.x, k, lanes);
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), unsigned_bits);
    magnitude = _mm512_max_epi32(magnitude, bits);
    __mmask16 asymmetric = lanes;
    if (f.separate) {
      const __mmask16 salient = salient_lanes(row.mask, k, lanes);
      salient_max = _mm512_mask_max_epi32(salient_max, salient, salient_max, bits);
      asymmetric = static_cast<__mmask16>(lanes & ~salient);
    }
    low_min = _mm512_mask_min_ps(low_min, asymmetric, low_min, x);
    low_max = _mm512_mask_max_ps(low_max, asymmetric, low_max, x);
  }
  // Bits of non-negative floats order as integers; Inf and NaN are the largest of them.
  return {_mm512_reduce_min_ps(low_min), _mm512_reduce_max_ps(low_max),
          float_of(static_cast<std::uint32_t>(_mm512_reduce_max_epi32(salient_max))),
          _mm512_reduce_max_epi32(magnitude) < 0x7f800000};
}

struct Lanes {
  __m512 step, zero, floor, ceiling, centre, gain;
};

Lanes broadcast(const Quantizer& q) {
  return {_mm512_set1_ps(q.step),    _mm512_set1_ps(q.zero),   _mm512_set1_ps(q.floor),
          _mm512_set1_ps(q.ceiling), _mm512_set1_ps(q.centre), _mm512_set1_ps(q.gain)};
}

__m512i quantize(__m512 x, const Lanes& low, const Lanes& salient, __mmask16 pick) {
  const auto choose = [pick](__m512 a, __m512 b) { return _mm512_mask_blend_ps(pick, a, b); };
  const __m512 rounded =
      _mm512_roundscale_ps(_mm512_div_ps(x, choose(low.step, salient.step)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 u = _mm512_add_ps(rounded, choose(low.zero, salient.zero));
  u = _mm512_max_ps(u, choose(low.floor, salient.floor));
  u = _mm512_min_ps(u, choose(low.ceiling, salient.ceiling));
  u = _mm512_mul_ps(_mm512_sub_ps(u, choose(low.centre, salient.centre)), choose(low.gain, salient.gain));
  return _mm512_cvttps_epi32(u);
}

// The chosen lanes, packed together, at `out`; nothing is written beyond them.
std::int64_t append(std::int8_t* out, __mmask16 chosen, __m512i codes) {
  const int count = __builtin_popcount(chosen);
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(chosen, codes));
  _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << count) - 1u), bytes);
  return count;
}

template <DType D>
void encode(const SpikeFormat& f, const SpikeRow& row, const TokenQuantizers& q) {
  const Lanes low = broadcast(q.low), salient = broadcast(q.salient);
  std::int8_t* first = row.codes;
  std::int8_t* second = row.codes + row.salient_offset;
  for (std::int64_t k = 0; k < f.K; k += 16) {
    const __mmask16 lanes = lanes_from(k, f.K), pick = salient_lanes(row.mask, k, lanes);
    const __m512i codes = quantize(load<D>(row.x, k, lanes), low, salient, pick);
    if (f.ranges == 1) {
      _mm_mask_storeu_epi8(row.codes + k, lanes, _mm512_cvtepi32_epi8(codes));
    } else {
      first += append(first, static_cast<__mmask16>(lanes & ~pick), codes);
      second += append(second, pick, codes);
    }
  }
}

std::int32_t sum(const std::int8_t* codes, std::int64_t count) {
  // Pairs of int8 add up to at most 254 in int16, pairs of those in int32.
  const __m512i ones8 = _mm512_set1_epi8(1), ones16 = _mm512_set1_epi16(1);
  __m512i total = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < count; k += 64) {
    const __mmask64 lanes = count - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count - k)) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(lanes, codes + k);
    total = _mm512_add_epi32(total, _mm512_madd_epi16(_mm512_maddubs_epi16(ones8, bytes), ones16));
  }
  return _mm512_reduce_add_epi32(total);
}

template <DType D>
void encode_row(const SpikeFormat& f, const SpikeRow& row) {
  const TokenExtremes e = extremes<D>(f, row);
  if (!e.finite) return write_not_finite(f, row);
  const TokenQuantizers q = token_quantizers(f, e);
  encode<D>(f, row, q);
  write_token(f, row, q);
  for_each_group(
      f, row, [&](const std::int8_t* codes, std::int64_t count, std::int64_t index) { row.sums[index] = sum(codes, count); });
}

}  // namespace

extern "C" void spike_encode_row_avx512(const SpikeFormat& f, const SpikeRow& row) {
  switch (row.dtype) {
    case DType::float32: return encode_row<DType::float32>(f, row);
    case DType::bfloat16: return encode_row<DType::bfloat16>(f, row);
    case DType::float16: return encode_row<DType::float16>(f, row);
  }
}

}  // namespace ranvier
