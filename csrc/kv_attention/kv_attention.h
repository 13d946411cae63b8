// kv_attention: keys and values of a decoder as 4-bit spike counts, and the attention that reads them packed.
//
// Per token and kv head x^ = zero + scale * v: v = 2 n with the nibble n on ordinary channels, v = 2 n + b with a further
// bit b on salient ones; scale and zero are float16. The cache is [batch, kv head, block] of 64 tokens each:
//
//   key codes    [4][Dp / 8][64]    16 tokens x 4 channels a line; low nibble: an even quad of channels, high: the next one
//   key bits     [4][kq][8]         one bit a token and channel of a salient quad, as wide as half a line's codes
//   key scale, key zero             [64] each
//   value codes  [16][Dp / 32][64]  16 channels x 4 tokens a line; low nibble: an even group of 16 channels, high: the next
//   value bits   [16][vg][8]        one bit a channel and token of a salient group
//   value scale, value zero         [64] each
//
// Within a head salient channels come first, so that they fill quads and groups; Dp is D rounded up to 32.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "core/status.h"

namespace ranvier {

constexpr std::int64_t kKvTokens = 64;   // tokens of a block
constexpr std::int64_t kKvChunk = 512;   // tokens summed up before partial results are merged: never the thread count's matter
constexpr std::int64_t kKvQueries = 16;  // queries that read a block while it is in the first cache
constexpr std::int64_t kKvMaxD = 512;
constexpr float kKvQueryTop = 32512.0f;  // 127 * 256: a query is two bytes

struct KvFormat {
  std::int64_t D;              // channels of a head
  std::int64_t key_salient;    // salient channels of a head that the keys' bits have room for
  std::int64_t value_salient;  // the same of the values

  RANVIER_INLINE std::int64_t padded() const { return (D + 31) / 32 * 32; }
  RANVIER_INLINE std::int64_t key_lines() const { return padded() / 8; }
  RANVIER_INLINE std::int64_t key_quads() const { return (key_salient + 3) / 4; }
  RANVIER_INLINE std::int64_t value_lines() const { return padded() / 32; }
  RANVIER_INLINE std::int64_t value_groups() const { return (value_salient + 15) / 16; }

  RANVIER_INLINE std::int64_t key_bits() const { return 32 * padded(); }
  RANVIER_INLINE std::int64_t key_scale() const { return key_bits() + (32 * key_quads() + 63) / 64 * 64; }
  RANVIER_INLINE std::int64_t key_zero() const { return key_scale() + 2 * kKvTokens; }
  RANVIER_INLINE std::int64_t value_codes() const { return key_zero() + 2 * kKvTokens; }
  RANVIER_INLINE std::int64_t value_bits() const { return value_codes() + 32 * padded(); }
  RANVIER_INLINE std::int64_t value_scale() const { return value_bits() + 128 * value_groups(); }
  RANVIER_INLINE std::int64_t value_zero() const { return value_scale() + 2 * kKvTokens; }
  RANVIER_INLINE std::int64_t block_bytes() const { return value_zero() + 2 * kKvTokens; }
};

// Tokens to append: int64 fields in the order in which Python packs them.
struct KvAppend {
  KvFormat format;
  std::int64_t batch, kv_heads, tokens, blocks, key_dtype, value_dtype;
  std::int64_t cache;                   // uint8 [batch][kv_heads][blocks][block_bytes]
  std::int64_t key_mask, value_mask;    // uint8 [kv_heads][D], non-zero where salient
  std::int64_t key, key_stride[3];      // [batch][kv_heads][tokens][D], strides in elements, the last one 1
  std::int64_t value, value_stride[3];  // the same
  std::int64_t positions;               // int64 [batch]: where the first token goes
  std::int64_t steps;                   // float [2][batch][kv_heads][tokens]: scale of keys, of values
};

// Queries: the last `queries` tokens of each row, the i-th sees those up to itself.
struct KvAttention {
  KvFormat format;
  std::int64_t batch, heads, kv_heads, queries, blocks, dtype;
  std::int64_t cache, key_mask, value_mask;
  std::int64_t query, query_stride[3];  // [batch][heads][queries][D]
  std::int64_t lengths, starts;         // int64 [batch]: tokens stored; the first visible one, 0: all
  std::int64_t mask, mask_stride[3];    // float [batch][heads][queries][blocks or less * 64], added to the logits, 0: none
  std::int64_t mask_width;
  std::int64_t out;  // [batch][heads][queries][D], dense, of the queries' type
};

// One query as the kernels read it: codes in the order of the head's keys.
struct KvQuery {
  const std::int8_t* high;  // [Dp]; q = step (256 high + low)
  const std::int8_t* low;
  float step;               // logit scale * log2(e) * step of q
  float sum;                // the logit of a key that is 1 everywhere
  std::int64_t begin, end;  // visible tokens
  const float* mask;        // one value a token, or nullptr
  bool bad;                 // not finite: the result is NaN
};

// Sums over a chunk of tokens: weights 2^(x - max), their sum, and the weighted values in the order of the head's values.
struct KvPartial {
  float max, sum;
  std::int64_t bad;
  float* out;  // [Dp]
};

struct KvChunk {
  KvFormat format;
  const std::uint8_t* block;  // the first one
  std::int64_t first, last;   // tokens of the chunk, first a multiple of 64
};

using KvAttentionChunk = void (*)(const KvChunk&, const KvQuery* queries, std::int64_t count, KvPartial* partials);
KvAttentionChunk kv_attention_chunk();

Status kv_append(const KvAppend& call);
Status kv_attention(const KvAttention& call, float scale);

extern "C" {
void kv_attention_chunk_scalar(const KvChunk& chunk, const KvQuery* queries, std::int64_t count, KvPartial* partials);
void kv_attention_chunk_avx2(const KvChunk& chunk, const KvQuery* queries, std::int64_t count, KvPartial* partials);
void kv_attention_chunk_avx512vnni(const KvChunk& chunk, const KvQuery* queries, std::int64_t count, KvPartial* partials);
}

}  // namespace ranvier
