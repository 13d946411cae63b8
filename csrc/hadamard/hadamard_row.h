// One row value by value: the order of additions that hadamard.h states. The scalar level, and what the others do with
// pieces shorter than a vector.
#pragma once

#include "hadamard/hadamard.h"

namespace ranvier {
namespace {

[[maybe_unused]] inline void hadamard_row(const HadamardRows& h, std::int64_t row, float* work) {
  const void* x = h.in(row);
  void* y = h.out(row);
  const std::int64_t p = h.piece();
  for (std::int64_t i = 0; i < h.n; ++i) work[i] = load_float(x, i, h.dtype);
  for (std::int64_t distance = 1; distance < p; distance *= 2) {
    for (std::int64_t base = 0; base < h.n; base += 2 * distance) {
      for (std::int64_t i = base; i < base + distance; ++i) {
        const float low = work[i], high = work[i + distance];
        work[i] = low + high;
        work[i + distance] = low - high;
      }
    }
  }
  if (h.core == 1) {
    for (std::int64_t i = 0; i < h.n; ++i) store_float(y, i, h.dtype, work[i] * h.scale);
    return;
  }
  for (std::int64_t out = 0; out < h.core; ++out) {
    for (std::int64_t i = 0; i < p; ++i) {
      float sum = h.matrix[out] * work[i];
      for (std::int64_t j = 1; j < h.core; ++j) sum += h.matrix[j * h.core + out] * work[j * p + i];
      store_float(y, out * p + i, h.dtype, sum * h.scale);
    }
  }
}

}  // namespace
}  // namespace ranvier
