// 2^x, the exponential of softmax, by one order of operations: one value, or the sixteen lanes of a level (P).
#pragma once

#include "core/numeric.h"

namespace ranvier {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
// 2^f - 1 over f on [-1/2, 1/2], least squares of the relative error: 1.6e-7 at most.
constexpr float kExp[5] = {0.6931468844413757f, 0.24022237956523895f, 0.05550890043377876f, 0.009671683423221111f,
                           0.0013219458051025867f};
constexpr float kExpLowest = -125.0f;  // below it 2^x counts as 0

// Round to nearest even for |x| < 2^22, without SSE4.1.
[[maybe_unused]] inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

[[maybe_unused]] inline float exp2_one(float x) {
  if (!(x >= kExpLowest)) return 0.0f;
  const float r = round_even(x), f = x - r;
  float p = kExp[4];
  for (int i = 3; i >= 0; --i) p = __builtin_fmaf(p, f, kExp[i]);
  p = __builtin_fmaf(p, f, 1.0f);
  return float_of(bits_of(p) + (static_cast<std::uint32_t>(static_cast<std::int32_t>(r)) << 23));
}

template <class P>
RANVIER_INLINE typename P::F exp2_lanes(typename P::F x) {
  using F = typename P::F;
  const F r = P::rint(P::max(x, P::set(kExpLowest))), f = P::sub(x, r);
  F p = P::set(kExp[4]);
  for (int i = 3; i >= 0; --i) p = P::fma(p, f, P::set(kExp[i]));
  p = P::fma(p, f, P::set(1.0f));
  return P::keep(P::at_least(x, kExpLowest), P::shift_exponent(p, r));
}

}  // namespace
}  // namespace ranvier
