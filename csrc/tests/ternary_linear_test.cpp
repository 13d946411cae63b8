// ternary_linear: every level equals 64-bit integers (scales one) and the scalar level's bits (any scales), over buffers that
// end or begin at a page nobody may touch.
#include "ternary_linear/ternary_linear.h"

#include <cmath>

#include "core/isa.h"
#include "tests/test.h"

using namespace ranvier;

namespace {

using test::Guarded;
using test::uniform;

std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) found.push_back(static_cast<Isa>(i));
  return found;
}

SpikeFormat format_of(std::int64_t K, std::int64_t salient, std::int64_t bits = 8) {
  return {K, K - salient, salient > 0 && salient < K ? 2 : 1, 0, bits, 1, 0, 0};
}

// A layer and codes for it in the layer's own order, all in exactly sized guarded memory.
struct Problem {
  SpikeFormat f;
  TernaryLayout layout;
  std::int64_t M, N, rows;
  Guarded<std::int8_t> codes;
  Guarded<float> scale;
  Guarded<std::uint8_t> mask, weight, weight_zero;
  Guarded<float> weight_scale, bias;
  bool has_bias = false;

  Problem(const SpikeFormat& format, std::int64_t tokens, std::int64_t outputs, bool at_begin)
      : f(format),
        layout(format),
        M(tokens),
        N(outputs),
        rows((outputs + 31) / 32),
        codes(M * f.K, at_begin),
        scale(M, at_begin),
        mask(f.K, at_begin),
        weight(rows * layout.blocks * 64, at_begin),
        weight_zero(rows * f.ranges * 32, at_begin),
        weight_scale(rows * f.ranges * 32, at_begin),
        bias(N, at_begin) {
    std::int64_t left = f.K - f.low;  // any K - low of the channels, each as likely
    for (std::int64_t k = 0; k < f.K; ++k) left -= mask[k] = uniform(0, f.K - k - 1) < left;
  }

  std::int64_t range_of(std::int64_t k) const { return f.ranges == 2 && mask[k] != 0 ? 1 : 0; }

  // The weight's bits: its byte, shift and the mask of its field.
  struct Field {
    std::int64_t byte;
    int shift, top;
  };

  Field field(std::int64_t n, std::int64_t k) const {
    const std::int64_t r = range_of(k), lane = n % 32;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < k; ++i) at += range_of(i) == r;
    const std::int64_t width = layout.two_bit[r] ? 8 : 4, block = (n / 32) * layout.blocks + layout.begin[r] + at / width;
    const std::int64_t byte = block * 64 + 4 * (lane % 16) + at % 4;
    if (layout.two_bit[r]) return {byte, static_cast<int>(at % 8 / 4 * 4 + lane / 16 * 2), 3};
    return {byte, static_cast<int>(lane / 16 * 4), 15};
  }

  int weight_at(std::int64_t n, std::int64_t k) const {
    const Field at = field(n, k);
    return weight[at.byte] >> at.shift & at.top;
  }

  std::int64_t table(std::int64_t n, std::int64_t r) const { return ((n / 32) * f.ranges + r) * 32 + n % 32; }

  SpikeLayer layer() const {
    return {f,
            N,
            mask.address(),
            weight.address(),
            weight_scale.address(),
            weight_zero.address(),
            0,
            has_bias ? bias.address() : 0,
            static_cast<std::int64_t>(DType::float32),
            2};
  }

  Status run(void* y, DType dtype) const { return ternary_linear(layer(), codes.data(), scale.data(), M, y, dtype); }
};

// extreme: 0 random; +1, -1: all codes at that end and all weights at their top.
void fill(Problem& p, int extreme, bool unit_scales) {
  const std::int64_t top = p.f.code_bound(0);
  for (std::int64_t i = 0; i < p.codes.size(); ++i) {
    p.codes[i] = static_cast<std::int8_t>(extreme == 0 ? uniform(-top, top) : extreme * top);
  }
  // Padding channels and outputs hold arbitrary fields: they must not count.
  for (std::int64_t i = 0; i < p.weight.size(); ++i)
    p.weight[i] = static_cast<std::uint8_t>(extreme == 0 ? uniform(0, 255) : 255);
  for (std::int64_t i = 0; i < p.weight_zero.size(); ++i) {
    p.weight_zero[i] = static_cast<std::uint8_t>(extreme != 0 ? 0 : uniform(0, 15));
    p.weight_scale[i] = unit_scales ? 1.0f : std::ldexp(static_cast<float>(uniform(1, 1000)), -12);
  }
  for (std::int64_t m = 0; m < p.M; ++m)
    p.scale[m] = unit_scales ? 1.0f : std::ldexp(static_cast<float>(uniform(1, 1000)), -12);
  for (std::int64_t n = 0; n < p.N; ++n) p.bias[n] = std::ldexp(static_cast<float>(uniform(-999, 999)), -8);
  p.has_bias = !unit_scales;
}

std::string where(const Problem& p, Isa isa) {
  return std::string(isa_name(isa)) + " M=" + std::to_string(p.M) + " N=" + std::to_string(p.N) +
         " K=" + std::to_string(p.f.K) + " low=" + std::to_string(p.f.low) + " bits=" + std::to_string(p.f.act_bits);
}

// With scales of one the output is the integer itself.
void check_exact(const Problem& p) {
  std::vector<std::int64_t> weight(static_cast<std::size_t>(p.f.K));
  std::vector<std::int64_t> truth(static_cast<std::size_t>(p.M * p.N), 0);
  for (std::int64_t n = 0; n < p.N; ++n) {
    for (std::int64_t k = 0; k < p.f.K; ++k) {
      weight[static_cast<std::size_t>(k)] = p.weight_at(n, k) - p.weight_zero[p.table(n, p.range_of(k))];
    }
    for (std::int64_t m = 0; m < p.M; ++m) {
      for (std::int64_t k = 0; k < p.f.K; ++k) {
        truth[static_cast<std::size_t>(m * p.N + n)] += p.codes[m * p.f.K + k] * weight[static_cast<std::size_t>(k)];
      }
    }
  }
  for (const Isa isa : levels()) {
    set_isa(isa);
    Guarded<float> y(p.M * p.N);
    EXPECT(p.run(y.data(), DType::float32) == Status::ok, where(p, isa));
    for (std::int64_t i = 0; i < p.M * p.N; ++i) {
      EXPECT(static_cast<double>(y[i]) == static_cast<double>(truth[static_cast<std::size_t>(i)]), where(p, isa));
    }
  }
}

template <class T>
void check_levels(const Problem& p, DType dtype) {
  Guarded<T> expected(p.M * p.N);
  set_isa(Isa::scalar);
  EXPECT(p.run(expected.data(), dtype) == Status::ok, "scalar");
  for (const Isa isa : levels()) {
    set_isa(isa);
    Guarded<T> y(p.M * p.N);
    EXPECT(p.run(y.data(), dtype) == Status::ok && test::same(y.data(), expected.data(), p.M * p.N), where(p, isa));
  }
}

}  // namespace

TEST(ternary_linear_is_exact_in_integers) {
  for (const std::int64_t K : {1, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 65}) {
    for (const std::int64_t salient : {std::int64_t{0}, K / 3, K}) {
      for (const std::int64_t M : {1, 2, 3, 4, 5, 11, 12, 13, 25}) {
        Problem p(format_of(K, salient), M, M % 2 ? 33 : 47, M % 3 == 0);
        fill(p, 0, true);
        check_exact(p);
      }
    }
  }
}

TEST(ternary_linear_int16_window_does_not_wrap) {
  // With codes of 127 a pair is at most 762 of an ordinary block, 43 of which fit into int16, and 3810 of a salient one: 8.
  for (const std::int64_t count : {7, 8, 9, 17, 41, 42, 43, 44, 85, 87}) {
    for (const std::int64_t salient : {std::int64_t{0}, 2 * count, 4 * count}) {
      for (const std::int64_t M : {1, 2, 3, 4, 13}) {
        for (const int extreme : {1, -1}) {
          Problem p(format_of(4 * count, salient), M, 32, extreme > 0);
          fill(p, extreme, true);
          check_exact(p);
        }
      }
    }
  }
}

TEST(ternary_linear_levels_equal_scalar) {
  for (const std::int64_t K : {1, 6, 64, 131}) {
    for (const std::int64_t salient : {std::int64_t{0}, (K + 2) / 3, K}) {
      for (const std::int64_t bits : {1, 4, 8}) {
        for (const std::int64_t N : {1, 8, 15, 16, 17, 31, 32, 33, 40}) {
          Problem p(format_of(K, salient, bits), N % 5 + 1, N, N % 2 == 0);
          fill(p, 0, false);
          check_levels<float>(p, DType::float32);
          check_levels<std::uint16_t>(p, DType::bfloat16);
          check_levels<std::uint16_t>(p, DType::float16);
        }
      }
    }
  }
}

TEST(ternary_linear_from_activations_equals_two_calls) {
  for (const Isa isa : levels()) {
    for (const std::int64_t K : {5, 64, 67, 700}) {
      for (const std::int64_t salient : {std::int64_t{0}, K / 3, K}) {
        for (const std::int64_t M : {0, 1, 2, 12, 13, 30}) {
          set_isa(isa);
          Problem p(format_of(K, salient), M, 35, false);
          fill(p, 0, false);
          Guarded<float> x(M * K), two(M * 35), one(M * 35);
          Guarded<std::int32_t> sums(M), zero(M);
          for (std::int64_t i = 0; i < M * K; ++i) x[i] = std::ldexp(static_cast<float>(uniform(-1000, 1000)), -7);
          const SpikeFormat plain = format_of(K, 0);
          Status s = spike_encode(plain, nullptr, x.data(), K, DType::float32, M, p.codes.data(), p.scale.data(), sums.data(),
                                  zero.data());
          EXPECT(s == Status::ok && p.run(two.data(), DType::float32) == Status::ok, where(p, isa));
          s = spike_linear_dynamic(p.layer(), x.data(), K, DType::float32, M, one.data(), DType::float32);
          EXPECT(s == Status::ok && test::same(one.data(), two.data(), M * 35), where(p, isa));
        }
      }
    }
  }
}

TEST(ternary_linear_refuses_what_does_not_belong_together) {
  Problem p(format_of(16, 4), 2, 5, false);
  fill(p, 0, false);
  Guarded<float> y(10);
  const auto run = [&](const SpikeLayer& l) {
    return ternary_linear(l, p.codes.data(), p.scale.data(), 2, y.data(), DType::float32);
  };
  EXPECT(run(p.layer()) == Status::ok, "whole");
  for (const auto field : {&SpikeLayer::weight, &SpikeLayer::weight_scale, &SpikeLayer::weight_zero, &SpikeLayer::mask}) {
    SpikeLayer missing = p.layer();
    missing.*field = 0;
    EXPECT(run(missing) == Status::null_pointer, "missing tensor");
  }
  SpikeLayer other = p.layer();
  other.weight_bits = 4;
  EXPECT(run(other) == Status::bad_shape, "4-bit weights");
  other.weight_bits = 3;
  EXPECT(spike_linear_dynamic(other, y.data(), 16, DType::float32, 0, y.data(), DType::float32) == Status::bad_shape, "3 bits");
  other = p.layer();
  other.format.steps = 2;
  EXPECT(run(other) == Status::bad_shape, "two steps");
  for (std::int64_t k = 0; k < 16; ++k) p.mask[k] = 1;
  EXPECT(run(p.layer()) == Status::bad_mask, "mask of 16 channels");
}
