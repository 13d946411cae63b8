// From a token's extremes to its quantizers: the scalar arithmetic that every level shares to the last bit.
// Internal linkage and builtins throughout, see core/numeric.h.
#pragma once

#include "spike_encode/spike_encode.h"

namespace ranvier {
namespace {

// code = (clip(rint(x / step) + zero, floor, ceiling) - centre) * gain
struct Quantizer {
  float step, zero, floor, ceiling, centre, gain;
};

struct TokenExtremes {
  float low_min, low_max;  // of the channels that set the asymmetric range
  float salient_max;       // largest magnitude among the channels of the symmetric range
  bool finite;
};

struct TokenQuantizers {
  Quantizer low, salient;
  float scale[2];
  std::int32_t zero[2];
};

[[maybe_unused]] inline float clamp(float value, float low, float high) {
  return __builtin_fminf(__builtin_fmaxf(value, low), high);
}

[[maybe_unused]] inline float clamp_step(float step) { return clamp(step, 1e-5f, 1e4f); }

[[maybe_unused]] inline Quantizer symmetric_quantizer(float magnitude) {
  return {clamp_step(magnitude / 127.0f), 0.0f, -127.0f, 127.0f, 0.0f, 1.0f};
}

[[maybe_unused]] inline Quantizer asymmetric_quantizer(float low, float step, float ceiling, bool centred, float gain) {
  // A centred range includes zero, so its zero point is a level: also where the scale's upper bound cut the range.
  const float raw = __builtin_rintf(-low / step), zero = centred ? clamp(raw, 0.0f, ceiling) : clamp(raw, -1e4f, 1e4f);
  return {step, zero, 0.0f, ceiling, centred ? zero : 0.0f, gain};
}

[[maybe_unused]] inline TokenQuantizers token_quantizers(const SpikeFormat& f, const TokenExtremes& whole) {
  const float clip = f.act_clip;
  const TokenExtremes e{whole.low_min * clip, whole.low_max * clip, whole.salient_max * clip, whole.finite};
  TokenQuantizers q{};
  const float levels = static_cast<float>(f.level_count()), steps = static_cast<float>(f.steps);
  const float span = e.low_max - e.low_min;
  float low_scale = 0.0f, salient_scale = 0.0f;
  if (f.act_bits == 8) {
    q.low = symmetric_quantizer(__builtin_fmaxf(e.low_max, -e.low_min));
    q.salient = f.separate ? symmetric_quantizer(e.salient_max) : q.low;
    low_scale = q.low.step, salient_scale = q.salient.step;
  } else if (f.separate) {
    q.low = asymmetric_quantizer(e.low_min, clamp_step(span / levels), levels, !f.compat, 1.0f);
    q.salient = symmetric_quantizer(e.salient_max);
    low_scale = q.low.step, salient_scale = q.salient.step;
  } else if (f.compat) {
    const float salient_levels = static_cast<float>((f.steps << f.act_bits) - 1);
    q.low = asymmetric_quantizer(e.low_min, clamp_step(span / levels), levels, false, 1.0f);
    q.salient = asymmetric_quantizer(e.low_min, clamp_step(span / salient_levels), salient_levels, false, 1.0f);
    low_scale = q.low.step, salient_scale = q.salient.step;
  } else {
    const float fine = clamp_step(span / (steps * levels));
    q.low = asymmetric_quantizer(e.low_min, steps * fine, levels, true, steps);
    q.salient = asymmetric_quantizer(e.low_min, fine, steps * levels, true, 1.0f);
    low_scale = salient_scale = fine;
  }
  if (!e.finite) low_scale = salient_scale = __builtin_nanf("");
  const bool first_is_salient = f.ranges == 1 && f.low == 0;
  q.scale[0] = first_is_salient ? salient_scale : low_scale;
  q.scale[1] = salient_scale;
  // What the codes still carry: nothing where they are centred.
  const Quantizer& first = first_is_salient ? q.salient : q.low;
  q.zero[0] = static_cast<std::int32_t>(first.zero - first.centre);
  q.zero[1] = static_cast<std::int32_t>(q.salient.zero - q.salient.centre);
  return q;
}

[[maybe_unused]] inline void write_token(const SpikeFormat& f, const SpikeRow& row, const TokenQuantizers& q) {
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    row.scale[r] = q.scale[r];
    if (row.zero != nullptr) row.zero[r] = q.zero[r];
  }
}

// A token with NaN or Inf has no codes: its scale is NaN, and so is every output made from it.
[[maybe_unused]] inline void write_not_finite(const SpikeFormat& f, const SpikeRow& row) {
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    std::memset(row.codes + (r == 0 ? 0 : row.salient_offset), 0, static_cast<std::size_t>(f.range_length(r)));
    row.scale[r] = __builtin_nanf("");
    if (row.zero != nullptr) row.zero[r] = 0;
  }
  for (std::int64_t g = 0; g < f.group_count(); ++g) row.sums[g] = 0;
}

// fn(codes of the group, their number, index of the group)
template <class Fn>
void for_each_group(const SpikeFormat& f, const SpikeRow& row, const Fn& fn) {
  std::int64_t index = 0;
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    const std::int8_t* codes = row.codes + (r == 0 ? 0 : row.salient_offset);
    const std::int64_t length = f.range_length(r), group = f.group == 0 ? length : f.group;
    for (std::int64_t k = 0; k < length; k += group, ++index) fn(codes + k, length - k < group ? length - k : group, index);
  }
}

}  // namespace
}  // namespace ranvier
