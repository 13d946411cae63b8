// spike_linear: every level equals 64-bit integers (scales one) and the scalar level's bits (any scales), over buffers that
// end or begin at a page nobody may touch.
#include <cmath>

#include "core/isa.h"
#include "core/parallel.h"
#include "spike_linear/spike_linear.h"
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

// A layer and codes for it, all in exactly sized guarded memory.
struct Problem {
  SpikeFormat f;
  std::int64_t M, N, rows, groups;
  Guarded<std::int8_t> codes;
  Guarded<float> scale;
  Guarded<std::int32_t> sums, zero;
  Guarded<std::uint8_t> weight, weight_zero;
  Guarded<float> weight_scale;
  Guarded<std::int32_t> weight_sum;
  Guarded<std::uint16_t> bias;
  DType bias_dtype;
  bool has_bias = false;

  Problem(const SpikeFormat& format, std::int64_t tokens, std::int64_t outputs, bool at_begin, DType bias_type = DType::float32)
      : f(format),
        M(tokens),
        N(outputs),
        rows((outputs + 31) / 32),
        groups(format.group_count()),
        codes(M * f.K, at_begin),
        scale(M * f.ranges, at_begin),
        sums(M * groups, at_begin),
        zero(M * f.ranges, at_begin),
        weight(rows * f.block_count() * 64, at_begin),
        weight_zero(rows * groups * 32, at_begin),
        weight_scale(rows * groups * 32, at_begin),
        weight_sum(rows * groups * 32, at_begin),
        bias(N * (bias_type == DType::float32 ? 2 : 1), at_begin),
        bias_dtype(bias_type) {}

  std::int64_t range_begin(std::int64_t r) const { return r == 0 ? 0 : f.low; }
  std::int64_t block_begin(std::int64_t r) const { return r == 0 ? 0 : f.blocks(0); }

  // fn(range, group, first channel, one past the last) in the order of the sums
  template <class Fn>
  void each_group(const Fn& fn) const {
    std::int64_t index = 0;
    for (std::int64_t r = 0; r < f.ranges; ++r) {
      const std::int64_t end = range_begin(r) + f.range_length(r), step = f.group == 0 ? f.range_length(r) : f.group;
      for (std::int64_t k = range_begin(r); k < end; k += step) fn(r, index++, k, k + step < end ? k + step : end);
    }
  }

  void set_weight(std::int64_t n, std::int64_t k, int q) {
    const std::int64_t r = f.ranges == 2 && k >= f.low ? 1 : 0, at = k - range_begin(r), lane = n % 32;
    std::uint8_t& byte = weight[((n / 32) * f.block_count() + block_begin(r) + at / 4) * 64 + 4 * (lane % 16) + at % 4];
    byte = static_cast<std::uint8_t>(lane < 16 ? (byte & 0xf0) | q : (byte & 0x0f) | (q << 4));
  }

  int weight_at(std::int64_t n, std::int64_t k) const {
    const std::int64_t r = f.ranges == 2 && k >= f.low ? 1 : 0, at = k - range_begin(r), lane = n % 32;
    const int byte = weight[((n / 32) * f.block_count() + block_begin(r) + at / 4) * 64 + 4 * (lane % 16) + at % 4];
    return lane < 16 ? byte & 15 : byte >> 4;
  }

  std::int64_t table(std::int64_t n, std::int64_t g) const { return ((n / 32) * groups + g) * 32 + n % 32; }

  void finish_sums() {
    each_group([&](std::int64_t, std::int64_t g, std::int64_t begin, std::int64_t end) {
      for (std::int64_t m = 0; m < M; ++m) {
        std::int32_t sum = 0;
        for (std::int64_t k = begin; k < end; ++k) sum += codes[m * f.K + k];
        sums[m * groups + g] = sum;
      }
      for (std::int64_t n = 0; n < 32 * rows; ++n) {
        std::int32_t sum = 0;
        for (std::int64_t k = begin; k < end; ++k) sum += weight_at(n, k) - weight_zero[table(n, g)];
        weight_sum[table(n, g)] = sum;
      }
    });
  }

  SpikeLayer layer() const {
    return {f,
            N,
            0,
            weight.address(),
            weight_scale.address(),
            weight_zero.address(),
            f.compat ? weight_sum.address() : 0,
            has_bias ? bias.address() : 0,
            static_cast<std::int64_t>(bias_dtype),
            4};
  }

  Status run(void* y, DType dtype) const {
    return spike_linear(layer(), codes.data(), scale.data(), sums.data(), zero.data(), M, y, dtype);
  }
};

// extreme: 0 random; +1, -1: all codes at that end of their range and all weights 15.
void fill(Problem& p, int extreme, bool unit_scales) {
  for (std::int64_t i = 0; i < p.M * p.f.K; ++i) {
    const std::int64_t r = p.f.ranges == 2 && i % p.f.K >= p.f.low ? 1 : 0, top = p.f.code_bound(r);
    const std::int64_t low = p.f.compat && !p.f.symmetric(r) ? 0 : -top;
    p.codes[i] = static_cast<std::int8_t>(extreme == 0 ? uniform(low, top) : extreme > 0 ? top : low);
  }
  // Padding channels and outputs hold arbitrary nibbles: they must not count.
  for (std::int64_t i = 0; i < p.weight.size(); ++i) p.weight[i] = static_cast<std::uint8_t>(uniform(0, 255));
  for (std::int64_t n = 0; n < p.N && extreme != 0; ++n) {
    for (std::int64_t k = 0; k < p.f.K; ++k) p.set_weight(n, k, 15);
  }
  for (std::int64_t i = 0; i < p.weight_zero.size(); ++i) {
    p.weight_zero[i] = static_cast<std::uint8_t>(extreme != 0 ? 0 : uniform(0, 15));
    p.weight_scale[i] = unit_scales ? 1.0f : std::ldexp(static_cast<float>(uniform(1, 1000)), -12);
  }
  for (std::int64_t i = 0; i < p.scale.size(); ++i) {
    p.scale[i] = unit_scales ? 1.0f : std::ldexp(static_cast<float>(uniform(1, 1000)), -12);
    p.zero[i] = static_cast<std::int32_t>(uniform(-60, 60));
  }
  p.has_bias = !unit_scales;
  for (std::int64_t n = 0; n < p.N; ++n)
    store_float(p.bias.data(), n, p.bias_dtype, std::ldexp(static_cast<float>(uniform(-999, 999)), -8));
  p.finish_sums();
}

std::string where(const Problem& p, Isa isa) {
  return std::string(isa_name(isa)) + " M=" + std::to_string(p.M) + " N=" + std::to_string(p.N) +
         " K=" + std::to_string(p.f.K) + " low=" + std::to_string(p.f.low) + " group=" + std::to_string(p.f.group) +
         " bits=" + std::to_string(p.f.act_bits) + " steps=" + std::to_string(p.f.steps) +
         " compat=" + std::to_string(p.f.compat);
}

// With scales of one the output is the integer itself.
void check_exact(Problem& p) {
  std::vector<std::int64_t> truth(static_cast<std::size_t>(p.M * p.N), 0);
  p.each_group([&](std::int64_t r, std::int64_t g, std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = 0; m < p.M; ++m) {
      const std::int64_t zero = p.f.compat ? p.zero[m * p.f.ranges + r] : 0;
      for (std::int64_t n = 0; n < p.N; ++n) {
        std::int64_t sum = 0;
        for (std::int64_t k = begin; k < end; ++k) {
          sum += (p.codes[m * p.f.K + k] - zero) * (p.weight_at(n, k) - p.weight_zero[p.table(n, g)]);
        }
        truth[static_cast<std::size_t>(m * p.N + n)] += sum;
      }
    }
  });
  for (const Isa isa : levels()) {
    set_isa(isa);
    Guarded<float> y(p.M * p.N);
    EXPECT(p.run(y.data(), DType::float32) == Status::ok, where(p, isa));
    for (std::int64_t i = 0; i < p.M * p.N; ++i)
      EXPECT(static_cast<double>(y[i]) == static_cast<double>(truth[static_cast<std::size_t>(i)]), where(p, isa));
  }
}

template <class T>
void check_levels(Problem& p, DType dtype) {
  Guarded<T> expected(p.M * p.N);
  set_isa(Isa::scalar);
  EXPECT(p.run(expected.data(), dtype) == Status::ok, "scalar");
  for (const Isa isa : levels()) {
    set_isa(isa);
    Guarded<T> y(p.M * p.N);
    EXPECT(p.run(y.data(), dtype) == Status::ok && test::same(y.data(), expected.data(), p.M * p.N), where(p, isa));
  }
}

std::vector<SpikeFormat> formats(std::int64_t K) {
  const std::int64_t salient = K / 3, two = salient > 0 ? 2 : 1;
  std::vector<SpikeFormat> found{{K, K, 1, 0, 4, 2, 0, 0}, {K, K, 1, 32, 4, 4, 0, 0}, {K, K, 1, 0, 8, 1, 0, 0}};
  for (const std::int64_t group : {0, 4, 32}) {
    found.push_back({K, K - salient, two, group, 4, 4, 0, 1});
    found.push_back({K, K - salient, two, group, 4, 1, 1, 0});
    found.push_back({K, K - salient, two, group, 4, 1, 1, 1});
  }
  return found;
}

std::int32_t two_threads(std::uint32_t* count) {
  *count = 2;
  return 0;
}

std::int32_t serial_pool(std::int64_t begin, std::int64_t end, std::int64_t, RangeFn fn, void* context) {
  for (std::int64_t i = end - 1; i >= begin; --i) fn(i, i + 1, context);
  return 0;
}

}  // namespace

TEST(spike_linear_is_exact_in_integers) {
  for (const std::int64_t K : {1, 3, 4, 5, 31, 32, 33, 65}) {
    for (const SpikeFormat& f : formats(K)) {
      for (const std::int64_t M : {1, 2, 3, 4, 5, 11, 12, 13, 25}) {
        Problem p(f, M, M % 2 ? 33 : 47, M % 3 == 0);
        fill(p, 0, true);
        check_exact(p);
      }
    }
  }
}

TEST(spike_linear_int16_window_does_not_wrap) {
  // max|code| 15, 30, 60, 127: 72, 36, 18, 8 blocks fit into int16; one more pair must have been flushed before.
  const std::int64_t rows[4][3] = {{4, 1, 72}, {4, 2, 36}, {4, 4, 18}, {8, 1, 8}};
  for (const auto& [bits, steps, blocks] : rows) {
    for (const std::int64_t count : {blocks - 1, blocks, blocks + 1, 2 * blocks, 2 * blocks + 1}) {
      for (const std::int64_t M : {1, 2, 3, 4, 13}) {
        for (const int extreme : {1, -1}) {
          Problem p({4 * count, 4 * count, 1, 0, bits, steps, 0, 0}, M, 32, extreme > 0);
          fill(p, extreme, true);
          check_exact(p);
        }
      }
    }
  }
}

TEST(spike_linear_levels_equal_scalar) {
  for (const std::int64_t K : {1, 6, 64, 131}) {
    for (const SpikeFormat& f : formats(K)) {
      for (const std::int64_t N : {1, 8, 15, 16, 17, 31, 32, 33, 40}) {
        for (const DType bias : {DType::float32, DType::bfloat16, DType::float16}) {
          Problem p(f, N % 5 + 1, N, N % 2 == 0, bias);
          fill(p, 0, false);
          check_levels<float>(p, DType::float32);
          check_levels<std::uint16_t>(p, DType::bfloat16);
          check_levels<std::uint16_t>(p, DType::float16);
        }
      }
    }
  }
}

TEST(spike_linear_extreme_scales_equal_scalar) {
  for (const float scale : {1e-5f, 1e4f, 1e-38f, 1e34f, std::nanf("")}) {
    Problem p({1037, 1030, 2, 0, 4, 1, 1, 1}, 5, 35, false);
    fill(p, 0, false);
    for (std::int64_t i = 0; i < p.scale.size(); i += 2) p.scale[i] = scale;
    // Zero points as large as compat has them: z_x S leaves 24 bits, and only a fused product rounds once.
    for (std::int64_t i = 0; i < p.zero.size(); ++i) p.zero[i] = static_cast<std::int32_t>(uniform(-10'000, 10'000));
    check_levels<float>(p, DType::float32);
  }
}

TEST(spike_linear_from_activations_equals_two_calls) {
  set_parallel(serial_pool, two_threads);
  for (const Isa isa : levels()) {
    for (const std::int64_t K : {5, 64, 67, 700}) {
      for (const SpikeFormat& f : formats(K)) {
        for (const std::int64_t M : {0, 1, 2, 12, 13, 60}) {
          set_isa(isa);
          Problem p(f, M, 35, false);
          fill(p, 0, false);
          Guarded<float> x(M * K), scale(M * f.ranges), two(M * 35), one(M * 35), reused(M * 35);
          Guarded<std::uint8_t> mask(K);
          for (std::int64_t k = 0; k < K; ++k) mask[k] = k >= f.low;
          for (std::int64_t i = 0; i < M * K; ++i) x[i] = std::ldexp(static_cast<float>(uniform(-1000, 1000)), -7);
          SpikeLayer layer = p.layer();
          layer.mask = mask.address();
          Status s = spike_encode(f, mask.data(), x.data(), K, DType::float32, M, p.codes.data(), scale.data(), p.sums.data(),
                                  p.zero.data());
          EXPECT(s == Status::ok, where(p, isa));
          s = spike_linear(layer, p.codes.data(), scale.data(), p.sums.data(), p.zero.data(), M, two.data(), DType::float32);
          EXPECT(s == Status::ok, where(p, isa));
          EXPECT(spike_linear_dynamic(layer, x.data(), K, DType::float32, M, one.data(), DType::float32) == Status::ok,
                 where(p, isa));
          EXPECT(test::same(one.data(), two.data(), M * 35), where(p, isa));
          std::vector<std::int64_t> encoding(static_cast<std::size_t>(spike_encoding_bytes(f, M) / 8 + 1));
          EXPECT(spike_encode_panels(f, mask.data(), x.data(), K, DType::float32, M, encoding.data()) == Status::ok,
                 where(p, isa));
          EXPECT(spike_linear_panels(layer, encoding.data(), M, reused.data(), DType::float32) == Status::ok, where(p, isa));
          EXPECT(test::same(reused.data(), two.data(), M * 35), where(p, isa));
        }
      }
    }
  }
  set_parallel(nullptr, nullptr);
}

TEST(spike_linear_refuses_missing_tensors) {
  Problem p({16, 12, 2, 0, 4, 2, 0, 1}, 2, 5, false);
  fill(p, 0, false);
  Guarded<float> y(10);
  const auto run = [&](const SpikeLayer& l) {
    return spike_linear(l, p.codes.data(), p.scale.data(), p.sums.data(), p.zero.data(), 2, y.data(), DType::float32);
  };
  EXPECT(run(p.layer()) == Status::ok, "whole");
  for (const auto field : {&SpikeLayer::weight, &SpikeLayer::weight_scale, &SpikeLayer::weight_zero, &SpikeLayer::weight_sum}) {
    SpikeLayer missing = p.layer();
    missing.*field = 0;
    EXPECT(run(missing) == Status::null_pointer, "missing tensor");
  }
  SpikeLayer bad = p.layer();
  bad.format.group = 3;
  EXPECT(run(bad) == Status::bad_shape, "group of 3");
}
