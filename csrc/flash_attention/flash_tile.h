// A tile, written once for every level: P has the sixteen lanes of core/lanes_*.h and kVectors, how many of them a group's
// sums take side by side.
#pragma once

#include "core/exp2.h"
#include "flash_attention/flash_attention.h"

namespace ranvier {
namespace {

constexpr std::int64_t kGroup = kFlashGroup, kKeys = kFlashKeys;

// c[r][16 C] += sum over n of a[r][n] b[n][16 C], or = where fresh; R rows of strides `a_row` and `c_row`.
template <class P, int R, int C>
RANVIER_INLINE void multiply(std::int64_t count, const float* a, std::int64_t a_row, const float* b, std::int64_t b_row,
                             float* c, std::int64_t c_row, bool fresh) {
  using F = typename P::F;
  F sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) sum[r][j] = fresh ? P::set(0.0f) : P::load(c + r * c_row + 16 * j);
  }
  for (std::int64_t n = 0; n < count; ++n) {
    F line[C];
    for (int j = 0; j < C; ++j) line[j] = P::load(b + n * b_row + 16 * j);
    for (int r = 0; r < R; ++r) {
      const F x = P::set(a[r * a_row + n]);
      for (int j = 0; j < C; ++j) sum[r][j] = P::fma(x, line[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) P::store(c + r * c_row + 16 * j, sum[r][j]);
  }
}

// The same over `vectors` vectors side by side.
template <class P, int R>
RANVIER_INLINE void multiply_wide(std::int64_t vectors, std::int64_t count, const float* a, std::int64_t a_row, const float* b,
                                  std::int64_t b_row, float* c, std::int64_t c_row, bool fresh) {
  std::int64_t j = 0;
  for (; j + P::kVectors <= vectors; j += P::kVectors) {
    multiply<P, R, P::kVectors>(count, a, a_row, b + 16 * j, b_row, c + 16 * j, c_row, fresh);
  }
  if constexpr (P::kVectors > 2) {
    for (; j + 2 <= vectors; j += 2) multiply<P, R, 2>(count, a, a_row, b + 16 * j, b_row, c + 16 * j, c_row, fresh);
  }
  for (; j < vectors; ++j) multiply<P, R, 1>(count, a, a_row, b + 16 * j, b_row, c + 16 * j, c_row, fresh);
}

struct RowState {
  alignas(64) float lanes[16];  // sums of weights
  float max;
  bool bad;
};

[[maybe_unused]] inline std::uint32_t first_lanes(std::int64_t n) {
  return n >= 16 ? 0xffffu : (n <= 0 ? 0u : (1u << static_cast<unsigned>(n)) - 1u);
}

// Logits of a row within a block, `seen` of them visible, become weights in place; what the row has so far is scaled down
// where the maximum grows.
template <class P>
RANVIER_INLINE void weigh(float* x, std::int64_t seen, RowState& state, float* out, std::int64_t padded) {
  using F = typename P::F;
  const std::int64_t vectors = (seen + 15) / 16;
  const F lowest = P::set(-__builtin_inff());
  F best = lowest;
  std::uint32_t wrong = 0;
  for (std::int64_t j = 0; j < vectors; ++j) {
    const std::uint32_t lanes = first_lanes(seen - 16 * j);
    const F value = P::choose(lanes, P::load(x + 16 * j), lowest);
    wrong |= lanes & ~P::below_inf(value);
    P::store(x + 16 * j, value);
    best = P::max(best, value);
  }
  state.bad |= wrong != 0;
  const float top = P::largest(best);
  if (top > state.max) {
    const F shrink = P::set(exp2_one(state.max - top));
    P::store(state.lanes, P::mul(P::load(state.lanes), shrink));
    for (std::int64_t d = 0; d < padded; d += 16) P::store(out + d, P::mul(P::load(out + d), shrink));
    state.max = top;
  }
  const F max = P::set(state.max);  // -inf where all are: the difference is NaN then, and its weight 0
  F sum = P::load(state.lanes);
  for (std::int64_t j = 0; j < vectors; ++j) {
    const F weight = exp2_lanes<P>(P::sub(P::load(x + 16 * j), max));
    P::store(x + 16 * j, weight);
    sum = P::add(sum, weight);
  }
  P::store(state.lanes, sum);
}

// One block of keys for one group of rows. seen: keys of the block that the first row sees, at most 64.
template <class P>
RANVIER_INLINE void attend_block(const FlashTile& t, const float* keys, const float* values, std::int64_t group,
                                 std::int64_t first_seen, RowState* states) {
  const std::int64_t rows = t.rows - group < kGroup ? t.rows - group : kGroup;  // those behind are padding
  alignas(64) float x[kGroup * kKeys];
  float* out = t.out + group * t.padded;
  const auto clamp = [](std::int64_t n) { return n < 0 ? std::int64_t{0} : (n > kKeys ? kKeys : n); };
  const std::int64_t all = clamp(first_seen + (rows - 1) * t.causal), shared = clamp(first_seen);
  multiply_wide<P, kGroup>((all + 15) / 16, t.D, t.q + group * t.padded, t.padded, keys, kKeys, x, kKeys, true);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t seen = clamp(first_seen + r * t.causal);
    if (seen > 0) weigh<P>(x + r * kKeys, seen, states[r], out + r * t.padded, t.padded);
  }
  const std::int64_t vectors = t.padded / 16;
  if (shared > 0) multiply_wide<P, kGroup>(vectors, shared, x, kKeys, values, t.padded, out, t.padded, false);
  // Keys that only later rows of the group see: a value beyond a row's own token never touches it.
  for (std::int64_t r = 1; r < rows; ++r) {
    const std::int64_t more = clamp(first_seen + r * t.causal) - shared;
    if (more > 0) {
      multiply_wide<P, 1>(vectors, more, x + r * kKeys + shared, kKeys, values + shared * t.padded, t.padded,
                          out + r * t.padded, t.padded, false);
    }
  }
}

template <class P>
RANVIER_INLINE void attend_tile(const FlashTile& t) {
  RowState states[kFlashRows];
  const std::int64_t rows = (t.rows + kGroup - 1) / kGroup * kGroup;
  for (std::int64_t r = 0; r < rows; ++r) {
    P::store(states[r].lanes, P::set(0.0f));
    states[r].max = -__builtin_inff();
    states[r].bad = false;
    for (std::int64_t d = 0; d < t.padded; d += 16) P::store(t.out + r * t.padded + d, P::set(0.0f));
  }
  const std::int64_t last = t.visible + (t.rows - 1) * t.causal;
  for (std::int64_t first = 0; first < last; first += kKeys) {
    const float* keys = t.keys + first * t.D;
    const float* values = t.values + first * t.padded;
    for (std::int64_t group = 0; group < rows; group += kGroup) {
      const std::int64_t seen = t.visible + group * t.causal - first;
      if (seen + (kGroup - 1) * t.causal > 0) attend_block<P>(t, keys, values, group, seen, states + group);
    }
  }
  for (std::int64_t r = 0; r < t.rows; ++r) t.sum[r] = states[r].bad ? __builtin_nanf("") : P::total(P::load(states[r].lanes));
}

}  // namespace
}  // namespace ranvier
