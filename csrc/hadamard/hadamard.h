// hadamard: y = x (C_m (x) S_p) / sqrt(m p) for rows of n = m p values, p a power of two; additions in float32.
//
// Every level adds in this order, so that results are equal bit for bit: butterflies (a + b, a - b) at distances 1, 2, 4,
// ... p / 2 within each of the m pieces of p values; then out_i = c_0i x_0 + c_1i x_1 + ... over the pieces; then one
// product with the scale. The products with +-1 are exact, so a fused multiply-add rounds as the addition does.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "core/status.h"

namespace ranvier {

struct HadamardRows {
  const void* x;  // [rows, n], contiguous
  void* y;        // [rows, n], may be x
  DType dtype;
  std::int64_t rows;
  std::int64_t n;       // order of the matrix
  std::int64_t core;    // m
  const float* matrix;  // [m, m] of +-1, row j holds what piece j adds to each output; nullptr where m is 1
  float scale;          // 1 / sqrt(n)

  RANVIER_INLINE std::int64_t piece() const { return n / core; }
  RANVIER_INLINE const void* in(std::int64_t row) const {
    return static_cast<const char*>(x) + row * n * (dtype == DType::float32 ? 4 : 2);
  }
  RANVIER_INLINE void* out(std::int64_t row) const {
    return static_cast<char*>(y) + row * n * (dtype == DType::float32 ? 4 : 2);
  }
};

// Rows begin to end; work holds n floats, 64-byte aligned.
using HadamardRun = void (*)(const HadamardRows&, std::int64_t begin, std::int64_t end, float* work);

Status hadamard(const void* x, void* y, std::int64_t rows, std::int64_t n, std::int64_t core, const float* matrix, DType dtype);

extern "C" {
void hadamard_rows_scalar(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work);
void hadamard_rows_avx2(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work);
void hadamard_rows_avx512(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work);
}

}  // namespace ranvier
