// flash_attention: softmax(scale q k^T) v, tile by tile with an online softmax; keys and values of many tokens, queries of many
// tokens (a prompt). Everything is computed in float32.
//
// A tile is up to kFlashRows queries of one head. Its keys come in blocks of 64, transposed, its values as rows padded to 16.
// Each sum is taken in the order of the channels or of the tokens, so its bits depend neither on the tile nor on the level.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "core/status.h"

namespace ranvier {

constexpr std::int64_t kFlashGroup = 6;   // rows whose sums are in registers together
constexpr std::int64_t kFlashRows = 60;   // of a tile
constexpr std::int64_t kFlashKeys = 64;   // of a block
constexpr std::int64_t kFlashMaxD = 512;  // channels of a head

// int64 fields in the order in which Python packs them. Strides in elements: batch, head, token; channels are dense.
struct FlashAttention {
  std::int64_t batch, heads, kv_heads, queries, keys, D, dtype, causal;
  std::int64_t q, q_stride[3];  // [batch][heads][queries][D]
  std::int64_t k, k_stride[3];  // [batch][kv_heads][keys][D]
  std::int64_t v, v_stride[3];
  std::int64_t out, out_stride[3];
};

// One tile. Row r sees the first `visible + r * causal` keys; rows are padded to whole groups.
struct FlashTile {
  std::int64_t D, padded, rows, visible, causal;
  const float* q;       // [rows][padded], times scale * log2(e)
  const float* keys;    // [blocks][D][64]
  const float* values;  // [keys][padded]
  float* out;           // [rows][padded]: sum of 2^(x - max) v
  float* sum;           // [rows]: sum of 2^(x - max), NaN where a logit is NaN or infinite
};

using FlashTileRun = void (*)(const FlashTile&);

Status flash_attention(const FlashAttention& call, float scale);

extern "C" {
void flash_attention_tile_scalar(const FlashTile& tile);
void flash_attention_tile_avx2(const FlashTile& tile);
void flash_attention_tile_avx512(const FlashTile& tile);
}

}  // namespace ranvier
