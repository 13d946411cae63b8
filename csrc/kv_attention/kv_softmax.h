// The walk over a chunk of cached tokens, written once for every level: P has 16 lanes of floats (F) and of int32 (I), and
// the two loops of dot products. The order of every rounding is fixed here, so all levels give equal bits.
// Internal linkage and builtins throughout, see core/numeric.h.
#pragma once

#include "core/exp2.h"
#include "kv_attention/kv_attention.h"

namespace ranvier {
namespace {

constexpr float kWeightTop = 65535.0f;   // a weight is two bytes
constexpr float kWeightLowest = 1e-30f;  // weights of a block that are all below it count as 0

// Running sums of one query within a chunk; the lanes are added up at its end.
struct KvState {
  alignas(64) float sum[16];
  alignas(64) float zero[16];  // the part of the values' zeros, equal for all channels
  float max;
  bool bad;
};

// What one block and query need between the steps.
struct KvWork {
  alignas(64) std::int32_t dots[kKvTokens];
  alignas(64) float x[kKvTokens];
  alignas(64) std::uint8_t high[kKvTokens];
  alignas(64) std::uint8_t low[kKvTokens];
};

[[maybe_unused]] inline std::uint32_t lanes_of(std::int64_t low, std::int64_t high, std::int64_t at) {
  const auto below = [at](std::int64_t n) {
    return n <= at ? 0u : (n - at >= 16 ? 0xffffu : (1u << static_cast<unsigned>(n - at)) - 1u);
  };
  return below(high) & ~below(low);
}

// Logits of a block in units of log2, invisible tokens at -inf. Returns their maximum, NaN where a visible one is NaN or inf.
template <class P>
RANVIER_INLINE float logits(const KvFormat& f, const std::uint8_t* block, const KvQuery& q, const float* mask, std::int64_t low,
                            std::int64_t high, KvWork& work) {
  using F = typename P::F;
  P::key_dots(f, block, q.high, q.low, work.dots);
  const auto* scale = reinterpret_cast<const std::uint16_t*>(block + f.key_scale());
  const auto* zero = reinterpret_cast<const std::uint16_t*>(block + f.key_zero());
  const F minus_inf = P::set(-__builtin_inff());
  F best = minus_inf;
  std::uint32_t wrong = 0;
  for (std::int64_t t = 0; t < kKvTokens; t += 16) {
    const std::uint32_t lanes = lanes_of(low, high, t);
    const F per_unit = P::mul(P::set(q.step), P::from_half(scale + t));
    F x = P::fma(P::from_half(zero + t), P::set(q.sum), P::mul(per_unit, P::from_int(P::load_int(work.dots + t))));
    if (mask != nullptr) x = P::add(x, P::mul(P::load_some(mask + t, lanes), P::set(kLog2E)));
    wrong |= lanes & ~P::below_inf(x);
    x = P::choose(lanes, x, minus_inf);
    P::store(work.x + t, x);
    best = P::max(best, x);
  }
  return wrong != 0 ? __builtin_nanf("") : P::largest(best);
}

// Weights 2^(x - max): their sum, the values' zeros, and weight * scale as two bytes in units of the returned step.
template <class P>
RANVIER_INLINE float weights(const KvFormat& f, const std::uint8_t* block, std::int64_t low, std::int64_t high, KvState& state,
                             KvWork& work) {
  using F = typename P::F;
  const auto* scale = reinterpret_cast<const std::uint16_t*>(block + f.value_scale());
  const auto* zero = reinterpret_cast<const std::uint16_t*>(block + f.value_zero());
  const F max = P::set(state.max), none = P::set(0.0f);
  F sum = P::load(state.sum), zeros = P::load(state.zero), best = none;
  std::uint32_t wrong = 0;
  for (std::int64_t t = 0; t < kKvTokens; t += 16) {
    const std::uint32_t lanes = lanes_of(low, high, t);
    const F p = exp2_lanes<P>(P::sub(P::load(work.x + t), max));
    const F weight = P::choose(lanes, P::mul(p, P::from_half(scale + t)), none);
    sum = P::add(sum, p);
    zeros = P::fma(p, P::choose(lanes, P::from_half(zero + t), none), zeros);
    wrong |= lanes & ~P::below_inf(weight);
    P::store(work.x + t, weight);
    best = P::max(best, weight);
  }
  P::store(state.sum, sum);
  P::store(state.zero, zeros);
  if (wrong != 0) {
    state.bad = true;
    return 0.0f;
  }
  const float top = P::largest(best);
  if (top < kWeightLowest) return 0.0f;
  const F inverse = P::set(kWeightTop / top);
  for (std::int64_t t = 0; t < kKvTokens; t += 16) {
    P::store_bytes(work.high + t, work.low + t, P::mul(P::load(work.x + t), inverse));
  }
  return top / kWeightTop;
}

template <class P>
RANVIER_INLINE void attend_block(const KvFormat& f, const std::uint8_t* block, std::int64_t first, std::int64_t last,
                                 const KvQuery& q, KvState& state, float* out, KvWork& work) {
  const std::int64_t end = q.end < last ? q.end : last;
  const std::int64_t low = q.begin > first ? q.begin - first : 0, high = end - first;
  if (state.bad || low >= high || low >= kKvTokens) return;
  const float max = logits<P>(f, block, q, q.mask == nullptr ? nullptr : q.mask + first, low, high, work);
  if (!(max < __builtin_inff())) {
    state.bad = true;
    return;
  }
  if (max == -__builtin_inff()) return;
  if (max > state.max) {
    const typename P::F shrink = P::set(exp2_one(state.max - max));
    P::store(state.sum, P::mul(P::load(state.sum), shrink));
    P::store(state.zero, P::mul(P::load(state.zero), shrink));
    for (std::int64_t d = 0; d < f.padded(); d += 16) P::store(out + d, P::mul(P::load(out + d), shrink));
    state.max = max;
  }
  const float step = weights<P>(f, block, low, high, state, work);
  if (step > 0.0f) P::add_values(f, block, work.high, work.low, step, out);
}

template <class P>
RANVIER_INLINE void attend_chunk(const KvChunk& c, const KvQuery* queries, std::int64_t count, KvPartial* partials) {
  const KvFormat& f = c.format;
  const std::int64_t bytes = f.block_bytes();
  KvState states[kKvQueries];
  KvWork work;
  for (std::int64_t i = 0; i < count; ++i) {
    P::store(states[i].sum, P::set(0.0f));
    P::store(states[i].zero, P::set(0.0f));
    states[i].max = -__builtin_inff();
    states[i].bad = queries[i].bad;
    for (std::int64_t d = 0; d < f.padded(); d += 16) P::store(partials[i].out + d, P::set(0.0f));
  }
  for (std::int64_t first = c.first; first < c.last; first += kKvTokens) {
    const std::uint8_t* block = c.block + (first - c.first) / kKvTokens * bytes;
    const std::int64_t last = first + kKvTokens < c.last ? first + kKvTokens : c.last;
    for (std::int64_t i = 0; i < count; ++i) {
      attend_block<P>(f, block, first, last, queries[i], states[i], partials[i].out, work);
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const typename P::F zero = P::set(P::total(P::load(states[i].zero)));
    for (std::int64_t d = 0; d < f.padded(); d += 16) P::store(partials[i].out + d, P::add(P::load(partials[i].out + d), zero));
    partials[i].max = states[i].max;
    partials[i].sum = P::total(P::load(states[i].sum));
    partials[i].bad = states[i].bad;
  }
}

}  // namespace
}  // namespace ranvier
