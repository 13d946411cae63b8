// kv_attention, any processor: 16 lanes as arrays, the dot products one by one.
#include "core/lanes_scalar.h"
#include "kv_attention/kv_softmax.h"

namespace ranvier {
namespace {

struct Ints {
  std::int32_t v[16];
};

struct Lanes : FloatLanes {
  using I = Ints;

  static I load_int(const std::int32_t* a) {
    I r;
    std::memcpy(r.v, a, sizeof r.v);
    return r;
  }
  static F from_half(const std::uint16_t* a) {
    return each([=](int i) { return half_to_float(a[i]); });
  }
  static F from_int(const I& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static void store_bytes(std::uint8_t* high, std::uint8_t* low, const F& a) {
    for (int i = 0; i < 16; ++i) {
      const auto whole = static_cast<std::int32_t>(round_even(a.v[i]));
      high[i] = static_cast<std::uint8_t>(whole >> 8);
      low[i] = static_cast<std::uint8_t>(whole & 255);
    }
  }

  // 2 n + b of byte i of a line; `bits` is the 8 bytes that belong to this half of it, or nullptr.
  static int count(std::uint8_t byte, bool upper, const std::uint8_t* bits, int i) {
    const int twice = upper ? byte >> 3 & 30 : byte << 1 & 30;
    return bits == nullptr ? twice : twice + (bits[i / 8] >> (i % 8) & 1);
  }

  static void key_dots(const KvFormat& f, const std::uint8_t* block, const std::int8_t* high, const std::int8_t* low,
                       std::int32_t* dots) {
    std::memset(dots, 0, kKvTokens * sizeof(std::int32_t));
    for (std::int64_t group = 0; group < 4; ++group) {
      for (std::int64_t quad = 0; quad < 2 * f.key_lines(); ++quad) {
        const std::uint8_t* line = block + (group * f.key_lines() + quad / 2) * 64;
        const std::uint8_t* bits = quad < f.key_quads() ? block + f.key_bits() + (group * f.key_quads() + quad) * 8 : nullptr;
        for (int i = 0; i < 64; ++i) {
          const std::int64_t d = 4 * quad + i % 4;
          dots[16 * group + i / 4] += (256 * high[d] + low[d]) * count(line[i], quad % 2 != 0, bits, i);
        }
      }
    }
  }

  static void add_values(const KvFormat& f, const std::uint8_t* block, const std::uint8_t* high, const std::uint8_t* low,
                         float step, float* out) {
    for (std::int64_t group = 0; group < 2 * f.value_lines(); ++group) {
      std::int32_t sums[16] = {0};
      for (std::int64_t quad = 0; quad < 16; ++quad) {
        const std::uint8_t* line = block + f.value_codes() + (quad * f.value_lines() + group / 2) * 64;
        const std::uint8_t* bits =
            group < f.value_groups() ? block + f.value_bits() + (quad * f.value_groups() + group) * 8 : nullptr;
        for (int i = 0; i < 64; ++i) {
          const std::int64_t t = 4 * quad + i % 4;
          sums[i / 4] += (256 * high[t] + low[t]) * count(line[i], group % 2 != 0, bits, i);
        }
      }
      for (int i = 0; i < 16; ++i) {
        out[16 * group + i] = __builtin_fmaf(step, static_cast<float>(sums[i]), out[16 * group + i]);
      }
    }
  }
};

}  // namespace

extern "C" void kv_attention_chunk_scalar(const KvChunk& chunk, const KvQuery* queries, std::int64_t count,
                                          KvPartial* partials) {
  attend_chunk<Lanes>(chunk, queries, count, partials);
}

}  // namespace ranvier
