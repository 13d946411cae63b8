// spike_rms_norm: every level writes the scalar level's bits, over rows that end at a page nobody may touch.
#include "spike_rms_norm/spike_rms_norm.h"

#include <cmath>

#include "core/isa.h"
#include "tests/test.h"

using namespace ranvier;

namespace {

struct Level {
  const char* name;
  RmsNormRow run;
};

std::vector<Level> levels() {
  std::vector<Level> found{{"scalar", rms_norm_row_scalar}};
#if defined(RANVIER_X86)
  if (detected_isa() >= Isa::avx2) found.push_back({"avx2", rms_norm_row_avx2});
  if (detected_isa() >= Isa::avx512) found.push_back({"avx512", rms_norm_row_avx512});
#endif
  return found;
}

float value(int kind, std::int64_t k) {
  const float sign = k % 2 ? -1.0f : 1.0f;
  switch (kind) {
    case 0: return 0.0f;
    case 1: return sign * 1e-40f;
    case 2: return sign * 3.4028235e38f;
    case 3: return k == 1 ? std::nanf("") : 1.0f;
    case 4: return k == 0 ? -INFINITY : 1.0f;
    default: return static_cast<float>(test::uniform(-1000, 1000)) * std::ldexp(1.0f, kind - 12);
  }
}

bool same_values(const test::Guarded<std::uint16_t>& a, const test::Guarded<std::uint16_t>& b, std::int64_t K, DType dtype) {
  for (std::int64_t k = 0; k < K; ++k) {
    const float left = load_float(a.data(), k, dtype), right = load_float(b.data(), k, dtype);
    if (bits_of(left) != bits_of(right) && (left == left || right == right)) return false;
  }
  return true;
}

}  // namespace

TEST(spike_rms_norm_levels_equal_scalar) {
  for (const std::int64_t K : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129}) {
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      const std::int64_t halves = K * (dtype == DType::float32 ? 2 : 1);
      test::Guarded<std::uint16_t> x(halves), weight(halves), expected(halves), got(halves);
      for (std::int64_t k = 0; k < K; ++k) store_float(weight.data(), k, dtype, value(12, k));
      for (int kind = 0; kind < 16; ++kind) {
        for (std::int64_t k = 0; k < K; ++k) store_float(x.data(), k, dtype, value(kind, k));
        for (const Weighting weighting : {Weighting::after_cast, Weighting::before_cast, Weighting::one_plus}) {
          for (const Level& level : levels()) {
            auto& y = level.run == rms_norm_row_scalar ? expected : got;
            y.poison();
            level.run(RmsNorm{x.data(), K, dtype, weight.data(), K, 1e-6f, weighting, nullptr}, x.data(), y.data());
            EXPECT(same_values(y, expected, K, dtype), std::string(level.name) + " K=" + std::to_string(K) +
                                                           " kind=" + std::to_string(kind) +
                                                           " dtype=" + std::to_string(static_cast<int>(dtype)));
          }
        }
      }
    }
  }
}

TEST(spike_rms_norm_without_its_output_gives_the_same_codes) {
  constexpr std::int64_t K = 37, M = 5;
  const SpikeFormat f{K, K, 1, 0, 4, 2, 0, 0};
  test::Guarded<float> x(M * K), weight(K), y(M * K), scale(2 * M);
  test::Guarded<std::int8_t> codes(M * K), again(M * K);
  test::Guarded<std::int32_t> sums(M), zero(M);
  for (std::int64_t i = 0; i < M * K; ++i) x[i] = value(10, i);
  for (std::int64_t k = 0; k < K; ++k) weight[k] = value(10, k);
  RmsNorm n{x.data(), K, DType::float32, weight.data(), K, 1e-6f, Weighting::after_cast, y.data()};
  EXPECT(spike_rms_norm(n, f, nullptr, M, codes.data(), scale.data(), sums.data(), zero.data()) == Status::ok, "with y");
  n.y = nullptr;
  EXPECT(spike_rms_norm(n, f, nullptr, M, again.data(), scale.data() + M, sums.data(), zero.data()) == Status::ok, "without");
  EXPECT(test::same(codes.data(), again.data(), M * K) && test::same(scale.data(), scale.data() + M, M), "codes");
  n.K = K - 1;
  EXPECT(spike_rms_norm(n, f, nullptr, M, again.data(), scale.data(), sums.data(), zero.data()) == Status::bad_shape, "K");
  n.K = K, n.weight = nullptr;
  EXPECT(spike_rms_norm(n, f, nullptr, M, again.data(), scale.data(), sums.data(), zero.data()) == Status::null_pointer, "w");
}
