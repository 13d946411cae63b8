// spike_encode: every level writes the scalar level's bits, over rows that end at a page nobody may touch.
#include <cmath>

#include "core/isa.h"
#include "spike_encode/spike_encode.h"
#include "spike_linear/spike_linear.h"
#include "tests/test.h"

using namespace ranvier;

namespace {

struct Level {
  const char* name;
  SpikeEncodeRow encode;
};

std::vector<Level> levels() {
  std::vector<Level> found{{"scalar", spike_encode_row_scalar}};
#if defined(RANVIER_X86)
  if (detected_isa() >= Isa::avx2) found.push_back({"avx2", spike_encode_row_avx2});
  if (detected_isa() >= Isa::avx512) found.push_back({"avx512", spike_encode_row_avx512});
#endif
  return found;
}

std::vector<SpikeFormat> formats(std::int64_t K, std::int64_t salient) {
  std::vector<SpikeFormat> found;
  const std::int64_t two = salient > 0 && salient < K ? 2 : 1, low = K - salient;
  for (const std::int64_t group : {0, 4, 32}) {
    for (const std::int64_t steps : {1, 2, 4}) {
      found.push_back({K, low, 1, group, 4, steps, 0, 0});
      found.push_back({K, low, steps > 1 ? two : 1, group, 4, steps, 0, 1});
    }
    found.push_back({K, low, 1, group, 1, 127, 0, 0});
    found.push_back({K, low, 1, group, 7, 1, 0, 0});
    found.push_back({K, low, two, group, 5, 4, 0, 1});
    found.push_back({K, low, two, group, 4, 1, 1, 0});
    found.push_back({K, low, two, group, 4, 1, 1, 1});
    found.push_back({K, low, two, group, 8, 1, 1, 0});
    found.push_back({K, low, 1, group, 8, 1, 0, 0});
  }
  for (std::size_t i = 0, count = found.size(); i < count; ++i) {
    found.push_back(found[i]);
    found.back().act_clip = i % 2 ? 0.9f : 1e-30f;
  }
  return found;
}

// Row `kind` of adversarial values.
float value(int kind, std::int64_t k) {
  const float sign = k % 2 ? -1.0f : 1.0f;
  switch (kind) {
    case 0: return 0.0f;
    case 1: return -0.0f;
    case 2: return 7.25f;
    case 3: return sign * 1e-40f;
    case 4: return sign * 1e30f;
    case 5: return sign * 3.4028235e38f;
    case 6: return 0.5f * static_cast<float>(k % 31) - 7.5f;
    case 7: return k == 0 ? -3.5f : 0.0f;
    case 8: return k == 2 ? std::nanf("") : 1.0f;
    case 9: return k == 0 ? -INFINITY : 1.0f;
    default: return static_cast<float>(test::uniform(-1000, 1000)) * std::ldexp(1.0f, static_cast<int>(kind) - 20);
  }
}

struct Output {
  test::Guarded<std::int8_t> codes;
  test::Guarded<float> scale;
  test::Guarded<std::int32_t> sums, zero;

  explicit Output(const SpikeFormat& f) : codes(f.K), scale(f.ranges), sums(f.group_count()), zero(f.ranges) {}

  void poison() { codes.poison(), scale.poison(), sums.poison(), zero.poison(); }
};

std::string where(const char* level, const SpikeFormat& f, int kind) {
  return std::string(level) + " K=" + std::to_string(f.K) + " low=" + std::to_string(f.low) +
         " group=" + std::to_string(f.group) + " bits=" + std::to_string(f.act_bits) + " steps=" + std::to_string(f.steps) +
         " separate=" + std::to_string(f.separate) + " compat=" + std::to_string(f.compat) + " kind=" + std::to_string(kind);
}

void compare(const SpikeFormat& f, const Output& got, const Output& expected, const char* level, int kind) {
  const bool equal = test::same(got.codes.data(), expected.codes.data(), f.K) &&
                     test::same(got.scale.data(), expected.scale.data(), f.ranges) &&
                     test::same(got.sums.data(), expected.sums.data(), f.group_count()) &&
                     test::same(got.zero.data(), expected.zero.data(), f.ranges);
  EXPECT(equal, where(level, f, kind));
  for (std::int64_t k = 0; k < f.K; ++k) {
    const std::int64_t bound = f.code_bound(f.ranges == 2 && k >= f.low ? 1 : 0);
    // Two quantizers that share a range share its bound.
    if (std::abs(got.codes[k]) > bound) EXPECT(false, where(level, f, kind) + " code " + std::to_string(got.codes[k]));
  }
}

// All kinds of rows of one format and type, over the same guarded memory.
void check_rows(const SpikeFormat& f, const std::vector<std::uint8_t>& salient, DType dtype) {
  test::Guarded<std::uint16_t> x(f.K * (dtype == DType::float32 ? 2 : 1));
  test::Guarded<std::uint8_t> mask(f.K);
  std::memcpy(mask.data(), salient.data(), salient.size());
  Output expected(f), got(f);
  for (int kind = 0; kind < 16; ++kind) {
    for (std::int64_t k = 0; k < f.K; ++k) store_float(x.data(), k, dtype, value(kind, k));
    for (const Level& level : levels()) {
      Output& out = level.encode == spike_encode_row_scalar ? expected : got;
      out.poison();
      level.encode(f, {x.data(), dtype, f.low == f.K ? nullptr : mask.data(), out.codes.data(), f.low, out.scale.data(),
                       out.sums.data(), out.zero.data()});
      compare(f, out, expected, level.name, kind);
    }
  }
}

}  // namespace

TEST(spike_encode_levels_equal_scalar) {
  for (const std::int64_t K : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129}) {
    for (const std::int64_t salient : {std::int64_t{0}, K / 3, K}) {
      std::vector<std::uint8_t> mask(static_cast<std::size_t>(K), 0);
      for (std::int64_t left = salient; left > 0;) {
        auto& chosen = mask[static_cast<std::size_t>(test::uniform(0, K - 1))];
        if (chosen == 0) chosen = 1, --left;
      }
      for (const SpikeFormat& f : formats(K, salient)) {
        for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
          check_rows(f, mask, dtype);
        }
      }
    }
  }
}

TEST(spike_encode_refuses_formats_that_do_not_fit) {
  const SpikeFormat good{16, 12, 1, 0, 4, 2, 0, 0};
  test::Guarded<float> x(16), scale(1);
  test::Guarded<std::int8_t> codes(16);
  test::Guarded<std::int32_t> sums(16), zero(1);
  std::fill(x.data(), x.data() + 16, 1.0f);
  std::vector<std::uint8_t> mask(16, 0);
  std::fill(mask.begin(), mask.begin() + 4, 1);
  const auto run = [&](const SpikeFormat& f) {
    return spike_encode(f, mask.data(), x.data(), 16, DType::float32, 1, codes.data(), scale.data(), sums.data(), zero.data());
  };
  EXPECT(run(good) == Status::ok, "good");
  for (auto [field, wrong] : std::vector<std::pair<std::int64_t SpikeFormat::*, std::int64_t>>{{&SpikeFormat::K, 0},
                                                                                               {&SpikeFormat::low, -1},
                                                                                               {&SpikeFormat::low, 17},
                                                                                               {&SpikeFormat::ranges, 0},
                                                                                               {&SpikeFormat::ranges, 3},
                                                                                               {&SpikeFormat::group, -4},
                                                                                               {&SpikeFormat::group, 6},
                                                                                               {&SpikeFormat::act_bits, 0},
                                                                                               {&SpikeFormat::act_bits, 9},
                                                                                               {&SpikeFormat::steps, 0},
                                                                                               {&SpikeFormat::steps, 9}}) {
    SpikeFormat bad = good;
    bad.*field = wrong;
    EXPECT(run(bad) == Status::bad_shape, std::to_string(wrong));
  }
  for (const float clip : {0.0f, -0.5f, 1.5f, std::nanf("")}) {
    SpikeFormat bad = good;
    bad.act_clip = clip;
    EXPECT(run(bad) == Status::bad_shape, std::to_string(clip));
  }
}
