// kv_attention, any processor: 16 lanes as arrays, the dot products one by one.
#include "kv_attention/kv_softmax.h"

namespace ranvier {
namespace {

struct Floats {
  float v[16];
};
struct Ints {
  std::int32_t v[16];
};

template <class Fn>
Floats each(const Fn& fn) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
  return r;
}

struct Lanes {
  using F = Floats;
  using I = Ints;

  static F set(float a) {
    return each([=](int) { return a; });
  }
  static F load(const float* a) {
    return each([=](int i) { return a[i]; });
  }
  static void store(float* to, const F& a) { std::memcpy(to, a.v, sizeof a.v); }
  static I load_int(const std::int32_t* a) {
    I r;
    std::memcpy(r.v, a, sizeof r.v);
    return r;
  }
  static F load_some(const float* a, std::uint32_t lanes) {
    return each([=](int i) { return lanes >> i & 1 ? a[i] : 0.0f; });
  }
  static F from_half(const std::uint16_t* a) {
    return each([=](int i) { return half_to_float(a[i]); });
  }
  static F from_int(const I& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  static F max(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F rint(const F& a) {
    return each([&](int i) { return round_even(a.v[i]); });
  }
  static F choose(std::uint32_t lanes, const F& a, const F& b) {
    return each([&](int i) { return lanes >> i & 1 ? a.v[i] : b.v[i]; });
  }
  static F keep(std::uint32_t lanes, const F& a) { return choose(lanes, a, set(0.0f)); }
  static std::uint32_t at_least(const F& a, float b) {
    std::uint32_t lanes = 0;
    for (int i = 0; i < 16; ++i) lanes |= (a.v[i] >= b ? 1u : 0u) << i;
    return lanes;
  }
  static std::uint32_t below_inf(const F& a) {
    std::uint32_t lanes = 0;
    for (int i = 0; i < 16; ++i) lanes |= (a.v[i] < __builtin_inff() ? 1u : 0u) << i;
    return lanes;
  }
  static F shift_exponent(const F& a, const F& r) {
    return each([&](int i) {
      return float_of(bits_of(a.v[i]) + (static_cast<std::uint32_t>(static_cast<std::int32_t>(r.v[i])) << 23));
    });
  }
  static float largest(const F& a) {
    float best = a.v[0];
    for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
    return best;
  }
  static float total(F a) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    }
    return a.v[0];
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
