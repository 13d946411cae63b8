// spike_rms_norm: every level writes the scalar level's bits, over rows that end at a page nobody may touch.
#include "spike_rms_norm/spike_rms_norm.h"

#include <cmath>

#include "tests/row_levels.h"

using namespace ranvier;

namespace {

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

}  // namespace

TEST(spike_rms_norm_levels_equal_scalar) {
  const auto levels = ROW_LEVELS(rms_norm_row);
  test::for_each_row([&](std::int64_t K, DType dtype) {
    test::Guarded<std::uint16_t> x(test::halves_of(K, dtype)), weight(test::halves_of(K, dtype));
    for (std::int64_t k = 0; k < K; ++k) store_float(weight.data(), k, dtype, value(12, k));
    for (int kind = 0; kind < 16; ++kind) {
      for (std::int64_t k = 0; k < K; ++k) store_float(x.data(), k, dtype, value(kind, k));
      for (const Weighting weighting : {Weighting::after_cast, Weighting::before_cast, Weighting::one_plus}) {
        const RmsNorm n{x.data(), K, dtype, weight.data(), K, 1e-6f, weighting, nullptr};
        test::expect_equal_rows(levels, K, dtype, kind, [&](RmsNormRow run, void* y) { run(n, x.data(), y); });
      }
    }
  });
}

TEST(spike_rms_norm_gives_the_codes_of_its_output) {
  constexpr std::int64_t K = 37, M = 5;
  const SpikeFormat f{K, K, 1, 0, 4, 2, 0, 0};
  test::Guarded<float> x(M * K), weight(K), y(M * K), scale(2 * M);
  test::Guarded<std::int8_t> codes(M * K), again(M * K);
  test::Guarded<std::int32_t> sums(M), zero(M);
  for (std::int64_t i = 0; i < M * K; ++i) x[i] = value(10, i);
  for (std::int64_t k = 0; k < K; ++k) weight[k] = value(10, k);
  RmsNorm n{x.data(), K, DType::float32, weight.data(), K, 1e-6f, Weighting::after_cast, y.data()};
  const auto run = [&] { return spike_rms_norm(n, f, nullptr, M, codes.data(), scale.data(), sums.data(), zero.data()); };
  EXPECT(run() == Status::ok, "norm");
  EXPECT(spike_encode(f, nullptr, y.data(), K, DType::float32, M, again.data(), scale.data() + M, sums.data(), zero.data()) ==
             Status::ok,
         "encode");
  EXPECT(test::same(codes.data(), again.data(), M * K) && test::same(scale.data(), scale.data() + M, M), "codes");
  n.K = K - 1;
  EXPECT(run() == Status::bad_shape, "K");
  n.K = K, n.weight = nullptr;
  EXPECT(run() == Status::null_pointer, "weight");
  n.weight = weight.data(), n.y = nullptr;
  EXPECT(run() == Status::null_pointer && spike_rms_norm_panels(n, f, nullptr, M, codes.data()) == Status::null_pointer, "y");
  EXPECT(rms_norm(n, M) == Status::null_pointer, "y of the norm alone");
}
