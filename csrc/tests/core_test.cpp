// The instruction-set table, 16-bit conversions, threads and scratch memory.
#include <atomic>
#include <cmath>
#include <thread>

#include "core/cpu_features.h"
#include "core/isa.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "tests/test.h"

using namespace ranvier;  // the conversions have internal linkage

TEST(isa_names_parse_and_nothing_else_does) {
  for (int i = 0; i < kIsaCount; ++i) {
    Isa isa = Isa::scalar;
    EXPECT(parse_isa(isa_name(static_cast<Isa>(i)), &isa) && isa == static_cast<Isa>(i), isa_name(static_cast<Isa>(i)));
  }
  for (const char* wrong : {"", "AVX2", "avx", "avx512 ", "scalar,avx2", "native"}) {
    Isa isa = Isa::avx2;
    EXPECT(!parse_isa(wrong, &isa) && isa == Isa::avx2, wrong);
  }
}

TEST(isa_is_capped_by_the_processor) {
  const Isa found = detected_isa();
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa asked = static_cast<Isa>(i), got = set_isa(asked);
    EXPECT(got == (asked < found ? asked : found) && active_isa() == got, isa_name(asked));
  }
  EXPECT(set_isa(found) == found, isa_name(found));
}

TEST(levels_need_the_registers_of_the_operating_system) {
  const CpuFeatures& f = cpu_features();
  EXPECT(!f.avx2 || (f.xcr0 & 0x6) == 0x6, "avx2 without ymm state");
  EXPECT(!(f.avx512_base || f.avx512_vnni || f.avx512_bf16) || (f.xcr0 & 0xe6) == 0xe6, "avx512 without zmm state");
}

TEST(half_to_float_is_exact_and_comes_back) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const std::uint16_t half = static_cast<std::uint16_t>(h);
    const int exponent = (h >> 10) & 31;
    const double mantissa = h & 1023, sign = h & 0x8000 ? -1.0 : 1.0;
    const float value = half_to_float(half);
    if (exponent == 31) {
      EXPECT(mantissa == 0 ? std::isinf(value) && std::signbit(value) == (sign < 0) : std::isnan(value), std::to_string(h));
      EXPECT(mantissa == 0 ? float_to_half(value) == half : std::isnan(half_to_float(float_to_half(value))), std::to_string(h));
      continue;
    }
    const double truth = sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
    EXPECT(value == truth && std::signbit(value) == (sign < 0), std::to_string(h));
    EXPECT(float_to_half(value) == half, std::to_string(h));
  }
}

TEST(bf16_to_float_is_exact_and_comes_back) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float value = bf16_to_float(static_cast<std::uint16_t>(h));
    EXPECT(bits_of(value) == h << 16, std::to_string(h));
    EXPECT(std::isnan(value) ? std::isnan(bf16_to_float(float_to_bf16(value))) : float_to_bf16(value) == h, std::to_string(h));
  }
}

// Between every two neighbours: the middle goes to the even one, a bit less or more to the nearer one.
template <class ToFloat, class FromFloat>
void check_rounding(std::uint32_t largest, const ToFloat& widen, const FromFloat& narrow) {
  for (std::uint32_t h = 0; h < largest; ++h) {
    const double low = widen(static_cast<std::uint16_t>(h)), high = widen(static_cast<std::uint16_t>(h + 1));
    const float middle = static_cast<float>((low + high) / 2);  // exact: one more bit than either
    for (const float sign : {1.0f, -1.0f}) {
      const std::uint32_t bit = sign < 0 ? 0x8000u : 0u, even = h & 1 ? h + 1 : h;
      EXPECT(narrow(sign * middle) == (bit | even), std::to_string(h));
      EXPECT(narrow(sign * std::nextafterf(middle, 0.0f)) == (bit | h), std::to_string(h));
      EXPECT(narrow(sign * std::nextafterf(middle, INFINITY)) == (bit | (h + 1)), std::to_string(h));
    }
  }
}

TEST(half_rounds_to_nearest_even) {
  check_rounding(0x7bff, half_to_float, float_to_half);
  EXPECT(float_to_half(65519.996f) == 0x7bff && float_to_half(65520.0f) == 0x7c00 && float_to_half(1e30f) == 0x7c00,
         "overflow");
  EXPECT(float_to_half(-65520.0f) == 0xfc00 && float_to_half(std::ldexp(1.0f, -25)) == 0, "ends");
}

TEST(bf16_rounds_to_nearest_even) {
  check_rounding(0x7f7f, bf16_to_float, float_to_bf16);
  EXPECT(float_to_bf16(3.4e38f) == 0x7f80 && float_to_bf16(-3.4e38f) == 0xff80, "overflow");
  EXPECT(std::isnan(bf16_to_float(float_to_bf16(float_of(0x7f800001u)))), "a small NaN payload is not lost to Inf");
}

TEST(loads_and_stores_by_dtype) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    test::Guarded<std::uint16_t> memory(dtype == DType::float32 ? 6 : 3);
    for (int i = 0; i < 3; ++i) store_float(memory.data(), i, dtype, 0.5f * static_cast<float>(i) - 0.25f);
    for (int i = 0; i < 3; ++i)
      EXPECT(load_float(memory.data(), i, dtype) == 0.5f * static_cast<float>(i) - 0.25f, std::to_string(i));
  }
}

namespace {

std::atomic<std::int64_t> pool_calls{0};

std::int32_t two_threads(std::uint32_t* count) {
  *count = 2;
  return 0;
}

std::int32_t pool(std::int64_t begin, std::int64_t end, std::int64_t, RangeFn fn, void* context) {
  ++pool_calls;
  std::thread other(fn, begin, (begin + end) / 2, context);
  fn((begin + end) / 2, end, context);
  other.join();
  return 0;
}

std::int32_t refusing_pool(std::int64_t, std::int64_t, std::int64_t, RangeFn, void*) { return 1; }

}  // namespace

TEST(every_task_runs_once) {
  for (const ParallelFor run :
       {static_cast<ParallelFor>(nullptr), static_cast<ParallelFor>(pool), static_cast<ParallelFor>(refusing_pool)}) {
    set_parallel(run, run == nullptr ? nullptr : two_threads);
    EXPECT(num_threads() == (run == nullptr ? 1 : 2), "threads");
    for (const std::int64_t tasks : {0, 1, 2, 7, 1000}) {
      for (const bool serial : {true, false}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(tasks));
        pool_calls = 0;
        parallel_tasks(tasks, serial, [&](std::int64_t i) { ++seen[static_cast<std::size_t>(i)]; });
        for (const auto& count : seen) EXPECT(count == 1, std::to_string(tasks));
        EXPECT(pool_calls == (run == pool && !serial && tasks > 1 ? 1 : 0), std::to_string(tasks));
      }
    }
  }
  set_parallel(nullptr, nullptr);
}

TEST(scratch_is_aligned_and_grows) {
  Scratch scratch;
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{1}, std::size_t{65}, std::size_t{64}, std::size_t{40} << 20, std::size_t{100}}) {
    void* memory = scratch.reserve(bytes);
    EXPECT(memory != nullptr && reinterpret_cast<std::uintptr_t>(memory) % 64 == 0, std::to_string(bytes));
    std::memset(memory, 0xff, bytes);
  }
}
