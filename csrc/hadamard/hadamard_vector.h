// The loops that levels with vectors share. V gives the registers: kLanes, load_x, store_y (converting), load, store, set,
// add, sub, mul, fma(a, b, c) = a b + c, and lanes(v): the butterflies within a vector, distances 1 to kLanes / 2.
#pragma once

#include "hadamard/hadamard_row.h"

namespace ranvier {
namespace {

// Three butterfly stages over eight registers, at distances 1, 2 and 4 registers.
template <class V>
RANVIER_INLINE void radix8(typename V::Reg (&r)[8]) {
  for (int distance = 1; distance < 8; distance *= 2) {
    for (int base = 0; base < 8; base += 2 * distance) {
      for (int i = base; i < base + distance; ++i) {
        const typename V::Reg low = r[i], high = r[i + distance];
        r[i] = V::add(low, high);
        r[i + distance] = V::sub(low, high);
      }
    }
  }
}

// Loads a piece, converts, and does the first stages: those within vectors and, where the piece has eight, those of eight.
// Returns the distance of the next stage.
template <class V>
std::int64_t first_pass(const HadamardRows& h, const void* x, std::int64_t from, float* piece) {
  constexpr std::int64_t L = V::kLanes;
  const std::int64_t p = h.piece();
  std::int64_t i = 0;
  for (; i + 8 * L <= p; i += 8 * L) {
    typename V::Reg r[8];
    for (int k = 0; k < 8; ++k) r[k] = V::lanes(V::load_x(x, from + i + k * L, h.dtype));
    radix8<V>(r);
    for (int k = 0; k < 8; ++k) V::store(piece + i + k * L, r[k]);
  }
  if (i == p) return 8 * L;
  for (; i < p; i += L) V::store(piece + i, V::lanes(V::load_x(x, from + i, h.dtype)));
  return L;
}

// The other stages: three a pass while there are three, then one a pass.
template <class V>
void later_passes(float* piece, std::int64_t p, std::int64_t distance) {
  constexpr std::int64_t L = V::kLanes;
  for (; 8 * distance <= p; distance *= 8) {
    for (std::int64_t base = 0; base < p; base += 8 * distance) {
      for (std::int64_t i = base; i < base + distance; i += L) {
        typename V::Reg r[8];
        for (int k = 0; k < 8; ++k) r[k] = V::load(piece + i + k * distance);
        radix8<V>(r);
        for (int k = 0; k < 8; ++k) V::store(piece + i + k * distance, r[k]);
      }
    }
  }
  for (; distance < p; distance *= 2) {
    for (std::int64_t base = 0; base < p; base += 2 * distance) {
      for (std::int64_t i = base; i < base + distance; i += L) {
        const typename V::Reg low = V::load(piece + i), high = V::load(piece + i + distance);
        V::store(piece + i, V::add(low, high));
        V::store(piece + i + distance, V::sub(low, high));
      }
    }
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
    for (int w = 0; w < W; ++w) {
      const typename V::Reg x = V::load(work + j * p + column + w * L);
      for (int k = 0; k < 4; ++k) sum[k][w] = V::fma(V::set(c[k]), x, sum[k][w]);
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
    for (std::int64_t from = 0; from < h.n; from += p) {
      later_passes<V>(work + from, p, first_pass<V>(h, x, from, work + from));
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
