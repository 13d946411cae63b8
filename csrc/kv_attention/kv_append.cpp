// kv_append: new tokens into the packed cache. One pass over D channels for the range, one for the codes; the work is a few
// hundred values a head and token, beside the whole cache that the attention after it reads.
#include "core/parallel.h"
#include "kv_attention/kv_attention.h"
#include "kv_attention/kv_order.h"

namespace ranvier {
namespace {

constexpr std::int64_t kSerialChannels = 2'048;
constexpr bool kBoth[2] = {true, false};  // keys, values
constexpr float kHalfMax = 65504.0f, kScaleMin = 0x1p-18f;

float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// Round to nearest even for |x| < 2^22, without SSE4.1.
float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

struct Range {
  std::uint16_t scale, zero;  // float16
  bool finite;
};

Range range_of(const float* x, std::int64_t D) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (std::int64_t d = 0; d < D; ++d) {
    finite = finite && (bits_of(x[d]) & 0x7fffffffu) < 0x7f800000u;
    low = x[d] < low ? x[d] : low;
    high = x[d] > high ? x[d] : high;
  }
  if (!finite) return {0x7e00u, 0, false};
  return {float_to_half(clamp((high - low) / 30.0f, kScaleMin, kHalfMax)), float_to_half(clamp(low, -kHalfMax, kHalfMax)),
          true};
}

void quantize(const float* x, const HeadOrder& order, const Range& range, std::uint8_t* codes) {
  const float fine = half_to_float(range.scale), zero = half_to_float(range.zero);
  for (std::int64_t j = 0; j < order.D; ++j) {
    const bool salient = j < order.salient;
    const float step = salient ? fine : 2.0f * fine;
    const float level = round_even(clamp((x[order.channel[j]] - zero) / step, 0.0f, salient ? 30.0f : 15.0f));
    codes[j] = static_cast<std::uint8_t>(salient ? level : 2.0f * level);
  }
}

void put_nibble(std::uint8_t* byte, bool upper, int nibble) {
  *byte = static_cast<std::uint8_t>(upper ? (*byte & 15) | nibble << 4 : (*byte & 240) | nibble);
}

void put_bit(std::uint8_t* bytes, std::int64_t index, int bit) {
  std::uint8_t* byte = bytes + index / 8;
  *byte = static_cast<std::uint8_t>((*byte & ~(1 << index % 8)) | bit << index % 8);
}

// codes [Dp] of token t of the block.
void put_key(const KvFormat& f, std::uint8_t* block, std::int64_t t, const std::uint8_t* codes, const Range& range) {
  const std::int64_t group = t / 16, lane = t % 16;
  for (std::int64_t d = 0; d < f.padded(); ++d) {
    const std::int64_t quad = d / 4, at = 4 * lane + d % 4;
    put_nibble(block + (group * f.key_lines() + quad / 2) * 64 + at, quad % 2 != 0, codes[d] >> 1);
    if (quad < f.key_quads()) put_bit(block + f.key_bits() + (group * f.key_quads() + quad) * 8, at, codes[d] & 1);
  }
  std::memcpy(block + f.key_scale() + 2 * t, &range.scale, 2);
  std::memcpy(block + f.key_zero() + 2 * t, &range.zero, 2);
}

void put_value(const KvFormat& f, std::uint8_t* block, std::int64_t t, const std::uint8_t* codes, const Range& range) {
  const std::int64_t quad = t / 4;
  for (std::int64_t d = 0; d < f.padded(); ++d) {
    const std::int64_t group = d / 16, at = 4 * (d % 16) + t % 4;
    put_nibble(block + f.value_codes() + (quad * f.value_lines() + group / 2) * 64 + at, group % 2 != 0, codes[d] >> 1);
    if (group < f.value_groups()) put_bit(block + f.value_bits() + (quad * f.value_groups() + group) * 8, at, codes[d] & 1);
  }
  std::memcpy(block + f.value_scale() + 2 * t, &range.scale, 2);
  std::memcpy(block + f.value_zero() + 2 * t, &range.zero, 2);
}

struct Rows {
  std::int64_t base;
  const std::int64_t* stride;
  DType dtype;

  void read(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t D, float* to) const {
    const std::int64_t at = b * stride[0] + h * stride[1] + t * stride[2];
    for (std::int64_t d = 0; d < D; ++d) to[d] = load_float(reinterpret_cast<const void*>(base), at + d, dtype);
  }
};

Status check(const KvAppend& c) {
  const KvFormat& f = c.format;
  if (f.D <= 0 || f.D > kKvMaxD || c.batch < 0 || c.kv_heads <= 0 || c.tokens < 0 || c.blocks < 0) return Status::bad_shape;
  if (f.key_salient < 0 || f.key_salient > f.D || f.value_salient < 0 || f.value_salient > f.D) return Status::bad_shape;
  if (c.batch == 0 || c.tokens == 0) return Status::ok;
  if (c.cache == 0 || c.key == 0 || c.value == 0 || c.key_mask == 0 || c.value_mask == 0 || c.positions == 0)
    return Status::null_pointer;
  if (!masks_fit(f, c.kv_heads, c.key_mask, c.value_mask)) return Status::bad_mask;
  const auto* at = reinterpret_cast<const std::int64_t*>(c.positions);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    if (at[b] < 0 || at[b] > c.blocks * kKvTokens - c.tokens) return Status::bad_shape;
  }
  return Status::ok;
}

void append_head(const KvAppend& c, std::int64_t b, std::int64_t h) {
  const KvFormat& f = c.format;
  const HeadOrder keys(f.D, reinterpret_cast<const std::uint8_t*>(c.key_mask) + h * f.D);
  const HeadOrder values(f.D, reinterpret_cast<const std::uint8_t*>(c.value_mask) + h * f.D);
  const Rows key{c.key, c.key_stride, static_cast<DType>(c.key_dtype)}, value{c.value, c.value_stride, static_cast<DType>(c.value_dtype)};
  auto* head = reinterpret_cast<std::uint8_t*>(c.cache) + (b * c.kv_heads + h) * c.blocks * f.block_bytes();
  auto* steps = reinterpret_cast<float*>(c.steps);
  const std::int64_t start = reinterpret_cast<const std::int64_t*>(c.positions)[b];
  float x[kKvMaxD];
  std::uint8_t codes[kKvMaxD];
  std::memset(codes, 0, sizeof codes);
  for (std::int64_t i = 0; i < c.tokens; ++i) {
    const std::int64_t t = start + i;
    std::uint8_t* block = head + t / kKvTokens * f.block_bytes();
    for (const bool is_key : kBoth) {
      const HeadOrder& order = is_key ? keys : values;
      (is_key ? key : value).read(b, h, i, f.D, x);
      const Range range = range_of(x, f.D);
      if (range.finite) quantize(x, order, range, codes);
      if (!range.finite) std::memset(codes, 0, sizeof codes);
      (is_key ? put_key : put_value)(f, block, t % kKvTokens, codes, range);
      steps[(((is_key ? 0 : c.batch) + b) * c.kv_heads + h) * c.tokens + i] = half_to_float(range.scale);
    }
  }
}

}  // namespace

Status kv_append(const KvAppend& c) {
  if (const Status s = check(c); s != Status::ok) return s;
  parallel_tasks(c.batch * c.kv_heads, c.batch * c.kv_heads * c.tokens * c.format.D < kSerialChannels,
                 [&](std::int64_t task) { append_head(c, task / c.kv_heads, task % c.kv_heads); });
  return Status::ok;
}

}  // namespace ranvier
