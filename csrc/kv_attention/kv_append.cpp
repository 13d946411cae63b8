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

// 2 n + b of every channel, in the order of the head.
void quantize(const float* x, const std::uint8_t* mask, const HeadOrder& order, const Range& range, std::uint8_t* codes) {
  const float fine = half_to_float(range.scale), coarse = 2.0f * fine, zero = half_to_float(range.zero);
  std::uint8_t natural[kKvMaxD];
  for (std::int64_t d = 0; d < order.D; ++d) {
    const bool salient = mask[d] != 0;
    const float level = round_even(clamp((x[d] - zero) / (salient ? fine : coarse), 0.0f, salient ? 30.0f : 15.0f));
    natural[d] = static_cast<std::uint8_t>(static_cast<std::int32_t>(salient ? level : 2.0f * level));
  }
  for (std::int64_t j = 0; j < order.D; ++j) codes[j] = natural[order.channel[j]];
}

std::uint8_t nibbles(int low, int high) { return static_cast<std::uint8_t>(low >> 1 | (high >> 1) << 4); }

void put_bit(std::uint8_t* bytes, std::int64_t index, int bit) {
  std::uint8_t* byte = bytes + index / 8;
  *byte = static_cast<std::uint8_t>((*byte & ~(1 << index % 8)) | bit << index % 8);
}

// codes [Dp] of token t of the block. A byte of codes is one token's, a byte of bits is shared with its neighbours.
void put_key(const KvFormat& f, std::uint8_t* block, std::int64_t t, const std::uint8_t* codes, const Range& range) {
  const std::int64_t group = t / 16, lane = t % 16;
  std::uint8_t* to = block + group * f.key_lines() * 64 + 4 * lane;
  for (std::int64_t line = 0; line < f.key_lines(); ++line, codes += 8, to += 64) {
    for (int c = 0; c < 4; ++c) to[c] = nibbles(codes[c], codes[4 + c]);
  }
  codes -= f.padded();
  for (std::int64_t d = 0; d < 4 * f.key_quads(); ++d) {
    put_bit(block + f.key_bits() + (group * f.key_quads() + d / 4) * 8, 4 * lane + d % 4, codes[d] & 1);
  }
  std::memcpy(block + f.key_scale() + 2 * t, &range.scale, 2);
  std::memcpy(block + f.key_zero() + 2 * t, &range.zero, 2);
}

void put_value(const KvFormat& f, std::uint8_t* block, std::int64_t t, const std::uint8_t* codes, const Range& range) {
  const std::int64_t quad = t / 4;
  std::uint8_t* to = block + f.value_codes() + quad * f.value_lines() * 64 + t % 4;
  for (std::int64_t line = 0; line < f.value_lines(); ++line, codes += 32, to += 64) {
    for (int c = 0; c < 16; ++c) to[4 * c] = nibbles(codes[c], codes[16 + c]);
  }
  codes -= f.padded();
  for (std::int64_t d = 0; d < 16 * f.value_groups(); ++d) {
    put_bit(block + f.value_bits() + (quad * f.value_groups() + d / 16) * 8, 4 * (d % 16) + t % 4, codes[d] & 1);
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
  const std::uint8_t* masks[2] = {reinterpret_cast<const std::uint8_t*>(c.key_mask) + h * f.D,
                                  reinterpret_cast<const std::uint8_t*>(c.value_mask) + h * f.D};
  const HeadOrder keys(f.D, masks[0]), values(f.D, masks[1]);
  const Rows key{c.key, c.key_stride, static_cast<DType>(c.key_dtype)};
  const Rows value{c.value, c.value_stride, static_cast<DType>(c.value_dtype)};
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
      if (range.finite) quantize(x, masks[is_key ? 0 : 1], order, range, codes);
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
