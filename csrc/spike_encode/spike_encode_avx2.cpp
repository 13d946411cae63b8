// spike_encode, AVX2 + FMA + F16C: eight channels at a time; with two ranges the codes are placed one by one.
#include <immintrin.h>

#include "spike_encode/spike_quantizer.h"

namespace ranvier {
namespace {

constexpr int kLanes = 8;

__m256 load8(const void* x, std::int64_t k, DType dtype) {
  if (dtype == DType::float32) return _mm256_loadu_ps(static_cast<const float*>(x) + k);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(x) + k));
  if (dtype == DType::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

__m256 load_tail(const void* x, std::int64_t k, std::int64_t K, DType dtype) {
  alignas(32) float lanes[kLanes] = {0};
  for (std::int64_t i = k; i < K; ++i) lanes[i - k] = load_float(x, i, dtype);
  return _mm256_load_ps(lanes);
}

__m256 load(const void* x, std::int64_t k, std::int64_t K, DType dtype) {
  return K - k >= kLanes ? load8(x, k, dtype) : load_tail(x, k, K, dtype);
}

// All bits set in the lanes whose channel is salient.
__m256 salient_lanes(const std::uint8_t* mask, std::int64_t k, std::int64_t K) {
  if (mask == nullptr) return _mm256_setzero_ps();
  std::int64_t bytes = 0;
  std::memcpy(&bytes, mask + k, static_cast<std::size_t>(K - k < kLanes ? K - k : kLanes));
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}

__m256 valid_lanes(std::int64_t k, std::int64_t K) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int left = K - k >= kLanes ? kLanes : static_cast<int>(K - k);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(left), index));
}

template <class Pick>
float fold(__m256 v, const Pick& pick) {
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = pick(best, lanes[i]);
  return best;
}

TokenExtremes extremes(const SpikeFormat& f, const SpikeRow& row) {
  const float inf = __builtin_inff();
  __m256 low_min = _mm256_set1_ps(f.compat ? inf : 0.0f), low_max = _mm256_set1_ps(f.compat ? -inf : 0.0f);
  __m256 salient_max = _mm256_setzero_ps();
  __m256i magnitude = _mm256_setzero_si256();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (std::int64_t k = 0; k < f.K; k += kLanes) {
    const __m256 x = load(row.x, k, f.K, row.dtype), size = _mm256_andnot_ps(sign, x);
    magnitude = _mm256_max_epi32(magnitude, _mm256_castps_si256(size));
    __m256 asymmetric = valid_lanes(k, f.K);
    if (f.separate) {
      const __m256 salient = salient_lanes(row.mask, k, f.K);
      salient_max = _mm256_max_ps(salient_max, _mm256_and_ps(salient, size));
      asymmetric = _mm256_andnot_ps(salient, asymmetric);
    }
    low_min = _mm256_blendv_ps(low_min, _mm256_min_ps(low_min, x), asymmetric);
    low_max = _mm256_blendv_ps(low_max, _mm256_max_ps(low_max, x), asymmetric);
  }
  const auto smaller = [](float a, float b) { return b < a ? b : a; };
  const auto larger = [](float a, float b) { return b > a ? b : a; };
  alignas(32) std::int32_t bits[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), magnitude);
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite = finite && bits[i] < 0x7f800000;
  return {fold(low_min, smaller), fold(low_max, larger), fold(salient_max, larger), finite};
}

__m256i quantize(__m256 x, const Quantizer& low, const Quantizer& salient, __m256 pick) {
  const auto choose = [pick](float a, float b) { return _mm256_blendv_ps(_mm256_set1_ps(a), _mm256_set1_ps(b), pick); };
  const __m256 rounded =
      _mm256_round_ps(_mm256_div_ps(x, choose(low.step, salient.step)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 u = _mm256_add_ps(rounded, choose(low.zero, salient.zero));
  u = _mm256_max_ps(u, choose(low.floor, salient.floor));
  u = _mm256_min_ps(u, choose(low.ceiling, salient.ceiling));
  u = _mm256_mul_ps(_mm256_sub_ps(u, choose(low.centre, salient.centre)), choose(low.gain, salient.gain));
  return _mm256_cvttps_epi32(u);
}

__m128i to_bytes(__m256i codes) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packs_epi16(words, words);
}

void encode(const SpikeFormat& f, const SpikeRow& row, const TokenQuantizers& q) {
  std::int8_t* low = row.codes;
  std::int8_t* salient = row.codes + row.salient_offset;
  for (std::int64_t k = 0; k < f.K; k += kLanes) {
    const std::int64_t count = f.K - k < kLanes ? f.K - k : kLanes;
    const __m256 pick = salient_lanes(row.mask, k, f.K);
    alignas(16) std::int8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes),
                    to_bytes(quantize(load(row.x, k, f.K, row.dtype), q.low, q.salient, pick)));
    if (f.ranges == 1) {
      std::memcpy(row.codes + k, bytes, static_cast<std::size_t>(count));
      continue;
    }
    for (std::int64_t i = 0; i < count; ++i) *(row.mask[k + i] ? salient++ : low++) = bytes[i];
  }
}

std::int32_t sum(const std::int8_t* codes, std::int64_t count) {
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  std::int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, bytes), ones16));
  }
  alignas(32) std::int32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
  std::int32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result += lanes[i];
  for (; k < count; ++k) result += codes[k];
  return result;
}

}  // namespace

extern "C" void spike_encode_row_avx2(const SpikeFormat& f, const SpikeRow& row) {
  const TokenExtremes e = extremes(f, row);
  if (!e.finite) return write_not_finite(f, row);
  const TokenQuantizers q = token_quantizers(f, e);
  encode(f, row, q);
  write_token(f, row, q);
  for_each_group(
      f, row, [&](const std::int8_t* codes, std::int64_t count, std::int64_t index) { row.sums[index] = sum(codes, count); });
}

}  // namespace ranvier
