// weight_only_linear: every level writes the scalar level's digits, over rows that end at a page nobody may touch.
#include "weight_only_linear/weight_only_linear.h"

#include <cmath>

#include "core/isa.h"
#include "tests/test.h"

using namespace ranvier;

namespace {

std::vector<std::pair<const char*, EncodeDigits>> levels() {
  std::vector<std::pair<const char*, EncodeDigits>> found{{"scalar", encode_digits_scalar}};
#if defined(RANVIER_X86)
  if (detected_isa() >= Isa::avx2) found.push_back({"avx2", encode_digits_avx2});
  if (detected_isa() >= Isa::avx512) found.push_back({"avx512", encode_digits_avx512});
#endif
  return found;
}

float value(int kind, std::int64_t k) {
  const float sign = k % 2 ? -1.0f : 1.0f;
  switch (kind) {
    case 0: return sign * 0.0f;
    case 1: return sign * 1e-44f;
    case 2: return sign * 3.4e38f;
    case 3: return k == 0 ? std::nanf("") : 1.0f;
    case 4: return k == 0 ? -INFINITY : 1.0f;
    case 5: return 0.5f * static_cast<float>(k % 31) - 7.5f;
    default: return static_cast<float>(test::uniform(-100000, 100000)) * std::ldexp(1.0f, kind - 20);
  }
}

}  // namespace

TEST(digits_levels_equal_scalar) {
  for (const std::int64_t K : {1, 3, 4, 15, 16, 17, 63, 65, 129}) {
    for (const std::int64_t digits : {1, 2, 3}) {
      for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
        for (int kind = 0; kind < 10; ++kind) {
          const std::int64_t group = kind % 2 ? 32 : 0, groups = group == 0 ? 1 : (K + group - 1) / group;
          test::Guarded<std::uint16_t> x(K * (dtype == DType::float32 ? 2 : 1));
          for (std::int64_t k = 0; k < K; ++k) store_float(x.data(), k, dtype, value(kind, k));
          test::Guarded<std::int8_t> expected(digits * K), codes(digits * K);
          test::Guarded<float> expected_scale(digits), scale(digits);
          test::Guarded<std::int32_t> expected_sums(digits * groups), sums(digits * groups);
          encode_digits_scalar(
              {x.data(), dtype, K, digits, group, expected.data(), expected_scale.data(), expected_sums.data()});
          for (const auto& [name, encode] : levels()) {
            codes.poison(), scale.poison(), sums.poison();
            encode({x.data(), dtype, K, digits, group, codes.data(), scale.data(), sums.data()});
            EXPECT(test::same(codes.data(), expected.data(), digits * K) &&
                       test::same(scale.data(), expected_scale.data(), digits) &&
                       test::same(sums.data(), expected_sums.data(), digits * groups),
                   std::string(name) + " K=" + std::to_string(K) + " kind=" + std::to_string(kind));
          }
        }
      }
    }
  }
}

TEST(weight_only_refuses_formats_that_do_not_fit) {
  SpikeLayer layer{};
  layer.format = {16, 16, 1, 0, 8, 1, 0, 0};
  layer.N = 32, layer.weight_bits = 4;
  float x[16] = {}, y[32];
  for (const std::int64_t digits : {std::int64_t{0}, kMostDigits + 1}) {
    EXPECT(weight_only_linear(layer, x, 16, DType::float32, 1, digits, y, DType::float32) == Status::bad_shape, "digits");
  }
  for (auto [field, wrong] : std::vector<std::pair<std::int64_t SpikeFormat::*, std::int64_t>>{
           {&SpikeFormat::K, 0}, {&SpikeFormat::ranges, 2}, {&SpikeFormat::act_bits, 4}, {&SpikeFormat::compat, 1}}) {
    SpikeLayer bad = layer;
    bad.format.*field = wrong;
    EXPECT(weight_only_linear(bad, x, 16, DType::float32, 1, 3, y, DType::float32) == Status::bad_shape, "format");
  }
  EXPECT(weight_only_linear(layer, nullptr, 16, DType::float32, 1, 3, y, DType::float32) == Status::null_pointer, "x");
}
