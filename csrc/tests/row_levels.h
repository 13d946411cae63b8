// What tests of kernels over one row of floats share: the levels that the processor has, and that each writes the first one's bits.
#pragma once

#include <type_traits>

#include "core/isa.h"
#include "core/numeric.h"
#include "tests/test.h"

namespace test {

template <class Run>
struct Level {
  const char* name;
  Run run;
};

// The levels that run here, the scalar one first.
#if defined(RANVIER_X86)
#define ROW_LEVELS(row) test::row_levels(row##_scalar, row##_avx2, row##_avx512)
#else
#define ROW_LEVELS(row) test::row_levels(row##_scalar, nullptr, nullptr)
#endif

template <class Run>
std::vector<Level<Run>> row_levels(Run scalar, std::common_type_t<Run> avx2, std::common_type_t<Run> avx512) {
  std::vector<Level<Run>> found{{"scalar", scalar}};
  if (ranvier::detected_isa() >= ranvier::Isa::avx2) found.push_back({"avx2", avx2});
  if (ranvier::detected_isa() >= ranvier::Isa::avx512) found.push_back({"avx512", avx512});
  return found;
}

// A row of K values of a type, at the end of a page: two bytes an element, or twice that.
inline std::int64_t halves_of(std::int64_t K, ranvier::DType dtype) { return K * (dtype == ranvier::DType::float32 ? 2 : 1); }

// fn(K, dtype) for lengths round the widths of vectors.
template <class Fn>
void for_each_row(const Fn& fn) {
  using ranvier::DType;
  for (const std::int64_t K : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129}) {
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) fn(K, dtype);
  }
}

// Equal bits of each value, every NaN alike.
inline bool same_values(const Guarded<std::uint16_t>& a, const Guarded<std::uint16_t>& b, std::int64_t K,
                        ranvier::DType dtype) {
  for (std::int64_t k = 0; k < K; ++k) {
    const float left = ranvier::load_float(a.data(), k, dtype), right = ranvier::load_float(b.data(), k, dtype);
    if (ranvier::bits_of(left) != ranvier::bits_of(right) && (left == left || right == right)) return false;
  }
  return true;
}

// call(run, y) writes a row of K values; every level's must be the first one's.
template <class Run, class Call>
void expect_equal_rows(const std::vector<Level<Run>>& levels, std::int64_t K, ranvier::DType dtype, int kind,
                       const Call& call) {
  Guarded<std::uint16_t> expected(halves_of(K, dtype)), got(halves_of(K, dtype));
  for (const Level<Run>& level : levels) {
    auto& y = level.run == levels.front().run ? expected : got;
    y.poison();
    call(level.run, y.data());
    EXPECT(same_values(y, expected, K, dtype), std::string(level.name) + " K=" + std::to_string(K) + " kind=" +
                                                   std::to_string(kind) + " dtype=" + std::to_string(static_cast<int>(dtype)));
  }
}

}  // namespace test
