// The loops that levels with vectors share. V gives the registers: kLanes, load_x, store_y (converting), load, store, set,
// add, sub, mul, fma(a, b, c) = a b + c, and lanes(v): the butterflies within a vector, distances 1 to kLanes / 2.
#pragma once

#include "hadamard/hadamard_row.h"

namespace ranvier {
namespace {

template <class V>
RANVIER_INLINE void butterfly(typename V::Reg& low, typename V::Reg& high) {
  const typename V::Reg difference = V::sub(low, high);
  low = V::add(low, high);
  high = difference;
}

// Three butterfly stages over eight registers, at distances 1, 2 and 4 registers. Named ones: an array would live on the
// stack.
template <class V>
struct Eight {
  typename V::Reg a, b, c, d, e, f, g, h;

  template <class Load>
  RANVIER_INLINE void load(const Load& load) {
    a = load(0), b = load(1), c = load(2), d = load(3), e = load(4), f = load(5), g = load(6), h = load(7);
  }
  RANVIER_INLINE void turn() {
    butterfly<V>(a, b), butterfly<V>(c, d), butterfly<V>(e, f), butterfly<V>(g, h);
    butterfly<V>(a, c), butterfly<V>(b, d), butterfly<V>(e, g), butterfly<V>(f, h);
    butterfly<V>(a, e), butterfly<V>(b, f), butterfly<V>(c, g), butterfly<V>(d, h);
  }
  RANVIER_INLINE void store(float* to, std::int64_t stride) const {
    V::store(to, a), V::store(to + stride, b), V::store(to + 2 * stride, c), V::store(to + 3 * stride, d);
    to += 4 * stride;
    V::store(to, e), V::store(to + stride, f), V::store(to + 2 * stride, g), V::store(to + 3 * stride, h);
  }
};

// Loads a piece, converts, and does the first stages: those within vectors and, where the piece has eight, those of eight.
// Returns the distance of the next stage.
template <class V>
RANVIER_INLINE std::int64_t first_pass(const HadamardRows& h, DType dtype, const void* x, std::int64_t from, float* piece) {
  constexpr std::int64_t L = V::kLanes;
  const std::int64_t p = h.piece();
  if (p < 8 * L) {
    for (std::int64_t i = 0; i < p; i += L) V::store(piece + i, V::lanes(V::load_x(x, from + i, dtype)));
    return L;
  }
  for (std::int64_t i = 0; i < p; i += 8 * L) {
    Eight<V> r;
    r.load([&](std::int64_t k) { return V::lanes(V::load_x(x, from + i + k * L, dtype)); });
    r.turn();
    r.store(piece + i, L);
  }
  return 8 * L;
}

// The other stages: three a pass while there are three, then one a pass.
template <class V>
void later_passes(float* piece, std::int64_t p, std::int64_t distance) {
  constexpr std::int64_t L = V::kLanes;
  for (; 8 * distance <= p; distance *= 8) {
    for (std::int64_t base = 0; base < p; base += 8 * distance) {
      for (std::int64_t i = base; i < base + distance; i += L) {
        Eight<V> r;
        r.load([&](std::int64_t k) { return V::load(piece + i + k * distance); });
        r.turn();
        r.store(piece + i, distance);
      }
    }
  }
  for (; distance < p; distance *= 2) {
    for (std::int64_t base = 0; base < p; base += 2 * distance) {
      for (std::int64_t i = base; i < base + distance; i += L) {
        typename V::Reg low = V::load(piece + i), high = V::load(piece + i + distance);
        butterfly<V>(low, high);
        V::store(piece + i, low);
        V::store(piece + i + distance, high);
      }
    }
  }
}

template <class V>
RANVIER_INLINE void walsh(const HadamardRows& h, DType dtype, const void* x, float* work) {
  const std::int64_t p = h.piece();
  for (std::int64_t from = 0; from < h.n; from += p) {
    later_passes<V>(work + from, p, first_pass<V>(h, dtype, x, from, work + from));
  }
}

// Four outputs of the core over W vectors of every piece: 4 W sums in registers.
template <class V, int W>
RANVIER_INLINE void mix4(const HadamardRows& h, const float* work, std::int64_t out, std::int64_t column, void* y) {
  constexpr std::int64_t L = V::kLanes;
  const std::int64_t p = h.piece();
  const float* c = h.matrix + out;
  typename V::Reg sum[4][W];
  for (int w = 0; w < W; ++w) {
    const typename V::Reg x = V::load(work + column + w * L);
    for (int k = 0; k < 4; ++k) sum[k][w] = V::mul(V::set(c[k]), x);
  }
  for (std::int64_t j = 1; j < h.core; ++j) {
    c += h.core;
    typename V::Reg x[W];
    for (int w = 0; w < W; ++w) x[w] = V::load(work + j * p + column + w * L);
    for (int k = 0; k < 4; ++k) {
      const typename V::Reg coefficient = V::set(c[k]);
      for (int w = 0; w < W; ++w) sum[k][w] = V::fma(coefficient, x[w], sum[k][w]);
    }
  }
  const typename V::Reg scale = V::set(h.scale);
  for (int k = 0; k < 4; ++k) {
    for (int w = 0; w < W; ++w) V::store_y(y, (out + k) * p + column + w * L, h.dtype, V::mul(sum[k][w], scale));
  }
}

template <class V>
void hadamard_vector_rows(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work) {
  constexpr std::int64_t L = V::kLanes;
  const std::int64_t p = h.piece();
  // Cores are multiples of four; a matrix of another order would be the caller's own.
  if (p < L || (h.core > 1 && h.core % 4 != 0)) {
    for (std::int64_t row = begin; row < end; ++row) hadamard_row(h, row, work);
    return;
  }
  for (std::int64_t row = begin; row < end; ++row) {
    const void* x = h.in(row);
    void* y = h.out(row);
    // The type is constant in each of the three loops.
    switch (h.dtype) {
      case DType::float32: walsh<V>(h, DType::float32, x, work); break;
      case DType::bfloat16: walsh<V>(h, DType::bfloat16, x, work); break;
      case DType::float16: walsh<V>(h, DType::float16, x, work); break;
    }
    if (h.core == 1) {
      const typename V::Reg scale = V::set(h.scale);
      for (std::int64_t i = 0; i < h.n; i += L) V::store_y(y, i, h.dtype, V::mul(V::load(work + i), scale));
      continue;
    }
    std::int64_t column = 0;
    for (; column + V::kColumns * L <= p; column += V::kColumns * L) {
      for (std::int64_t out = 0; out < h.core; out += 4) mix4<V, V::kColumns>(h, work, out, column, y);
    }
    for (; column < p; column += L) {
      for (std::int64_t out = 0; out < h.core; out += 4) mix4<V, 1>(h, work, out, column, y);
    }
  }
}

}  // namespace
}  // namespace ranvier
