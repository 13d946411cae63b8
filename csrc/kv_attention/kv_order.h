// The order of a head's channels in the cache: salient ones first, both parts ascending.
#pragma once

#include "kv_attention/kv_attention.h"

namespace ranvier {
namespace {

struct HeadOrder {
  std::int64_t D, salient = 0;
  std::int16_t channel[kKvMaxD];

  HeadOrder(std::int64_t channels, const std::uint8_t* mask) : D(channels) {
    for (std::int64_t d = 0; d < D; ++d) salient += mask[d] != 0;
    for (std::int64_t d = 0, first = 0, other = salient; d < D; ++d) {
      channel[mask[d] != 0 ? first++ : other++] = static_cast<std::int16_t>(d);
    }
  }
};

// Whether no head marks more channels than its bits have room for.
[[maybe_unused]] inline bool masks_fit(const KvFormat& f, std::int64_t kv_heads, std::int64_t key_mask,
                                       std::int64_t value_mask) {
  for (std::int64_t h = 0; h < kv_heads; ++h) {
    std::int64_t keys = 0, values = 0;
    for (std::int64_t d = 0; d < f.D; ++d) {
      keys += reinterpret_cast<const std::uint8_t*>(key_mask)[h * f.D + d] != 0;
      values += reinterpret_cast<const std::uint8_t*>(value_mask)[h * f.D + d] != 0;
    }
    if (keys > f.key_salient || values > f.value_salient) return false;
  }
  return true;
}

}  // namespace
}  // namespace ranvier
