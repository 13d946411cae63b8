// spike_silu_mul: every level writes the scalar level's bits, over rows that end at a page nobody may touch, and the whole
// gated MLP gives what its parts give.
#include "spike_silu_mul/spike_silu_mul.h"

#include <cmath>

#include "tests/row_levels.h"

using namespace ranvier;

namespace {

float value(int kind, std::int64_t k) {
  const float sign = k % 2 ? -1.0f : 1.0f;
  switch (kind) {
    case 0: return sign * 0.0f;
    case 1: return sign * 3.4028235e38f;
    case 2: return k % 3 ? sign * INFINITY : std::nanf("");
    case 3: return sign * (80.0f + static_cast<float>(k % 30));
    default: return static_cast<float>(test::uniform(-1000, 1000)) * std::ldexp(1.0f, kind - 12);
  }
}

// A layer of random weights; its memory.
struct Weights {
  test::Guarded<std::uint8_t> packed, zero;
  test::Guarded<float> scale;
  SpikeLayer layer{};

  Weights(std::int64_t K, std::int64_t N)
      : packed((N + 31) / 32 * ((K + 3) / 4) * 64), zero((N + 31) / 32 * 32), scale((N + 31) / 32 * 32) {
    for (std::int64_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<std::uint8_t>(test::uniform(0, 255));
    for (std::int64_t i = 0; i < zero.size(); ++i) zero[i] = static_cast<std::uint8_t>(test::uniform(0, 15));
    for (std::int64_t i = 0; i < scale.size(); ++i) scale[i] = 0.01f * static_cast<float>(test::uniform(1, 9));
    layer.format = {K, K, 1, 0, 4, 2, 0, 0};
    layer.weight_bits = 4, layer.N = N, layer.weight = packed.address(), layer.weight_scale = scale.address(),
    layer.weight_zero = zero.address();
  }
};

}  // namespace

TEST(spike_silu_mul_levels_equal_scalar) {
  const auto levels = ROW_LEVELS(silu_mul_row);
  test::for_each_row([&](std::int64_t K, DType dtype) {
    test::Guarded<std::uint16_t> gate(test::halves_of(K, dtype)), up(test::halves_of(K, dtype));
    for (int kind = 0; kind < 16; ++kind) {
      for (std::int64_t k = 0; k < K; ++k) {
        store_float(gate.data(), k, dtype, value(kind, k));
        store_float(up.data(), k, dtype, value(10, k));
      }
      test::expect_equal_rows(levels, K, dtype, kind,
                              [&](SiluMulRow run, void* y) { run(gate.data(), up.data(), dtype, K, y); });
    }
  });
}

TEST(spike_silu_mul_needs_its_output) {
  constexpr std::int64_t K = 8;
  const SpikeFormat f{K, K, 1, 0, 4, 2, 0, 0};
  test::Guarded<float> gate(K), up(K), scale(1);
  test::Guarded<std::int8_t> codes(K);
  test::Guarded<std::int32_t> sums(1);
  const SiluMul g{gate.data(), up.data(), DType::float32, K, nullptr};
  EXPECT(spike_silu_mul(g, f, nullptr, 1, codes.data(), scale.data(), sums.data(), nullptr) == Status::null_pointer, "y");
}

TEST(spike_gated_mlp_is_its_parts) {
  constexpr std::int64_t K = 21, N = 70, M = 13;
  const Weights gate(K, N), up(K, N), down(N, K);
  test::Guarded<float> x(M * K), y(M * K), expected(M * K), hidden(2 * M * N), g(M * N), u(M * N);
  for (std::int64_t i = 0; i < M * K; ++i) x[i] = value(6, i);
  EXPECT(spike_linear_dynamic(gate.layer, x.data(), K, DType::float32, M, g.data(), DType::float32) == Status::ok, "gate");
  EXPECT(spike_linear_dynamic(up.layer, x.data(), K, DType::float32, M, u.data(), DType::float32) == Status::ok, "up");
  for (std::int64_t m = 0; m < M; ++m) silu_mul_row()(g.data() + m * N, u.data() + m * N, DType::float32, N, g.data() + m * N);
  EXPECT(spike_linear_dynamic(down.layer, g.data(), N, DType::float32, M, expected.data(), DType::float32) == Status::ok, "");
  SpikeMlp mlp{gate.layer, up.layer, down.layer, x.data(), nullptr, hidden.data(), y.data(), DType::float32};
  EXPECT(spike_gated_mlp(mlp, M) == Status::ok, "x");
  EXPECT(test::same(y.data(), expected.data(), M * K), "from x");
  std::vector<char> encoding(static_cast<std::size_t>(spike_encoding_bytes(gate.layer.format, M)) + 64);
  EXPECT(spike_encode_panels(gate.layer.format, nullptr, x.data(), K, DType::float32, M, encoding.data()) == Status::ok, "");
  y.poison();
  mlp.x = nullptr, mlp.encoding = encoding.data();
  EXPECT(spike_gated_mlp(mlp, M) == Status::ok, "encoding");
  EXPECT(test::same(y.data(), expected.data(), M * K), "from an encoding");
  mlp.up.format.steps = 4;
  EXPECT(spike_gated_mlp(mlp, M) == Status::bad_shape, "two formats");
  mlp.up.format.steps = 2, mlp.down.format.K = N - 1;
  EXPECT(spike_gated_mlp(mlp, M) == Status::bad_shape, "width");
}
