// Sixteen lanes of float32 as an array, for any processor. The levels with vectors have the same names, core/lanes_avx2.h and
// core/lanes_avx512.h; equal operations give equal bits on all of them.
#pragma once

#include "core/exp2.h"

namespace ranvier {
namespace {

struct Floats {
  float v[16];
};

template <class Fn>
Floats each(const Fn& fn) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
  return r;
}

struct FloatLanes {
  using F = Floats;

  static F set(float a) {
    return each([=](int) { return a; });
  }
  static F load(const float* a) {
    return each([=](int i) { return a[i]; });
  }
  static void store(float* to, const F& a) { std::memcpy(to, a.v, sizeof a.v); }
  static F load_some(const float* a, std::uint32_t lanes) {
    return each([=](int i) { return lanes >> i & 1 ? a[i] : 0.0f; });
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
};

}  // namespace
}  // namespace ranvier
