// hadamard: every level equals the scalar twin bit for bit, and a product with the dense matrix within rounding.
#include "hadamard/hadamard.h"

#include <cmath>

#include "core/isa.h"
#include "test.h"

namespace {

using namespace ranvier;

struct Level {
  const char* name;
  HadamardRun run;
};

std::vector<Level> levels() {
  std::vector<Level> found{{"scalar", hadamard_rows_scalar}};
#if defined(RANVIER_X86)
  if (detected_isa() >= Isa::avx2) found.push_back({"avx2", hadamard_rows_avx2});
  if (detected_isa() >= Isa::avx512) found.push_back({"avx512", hadamard_rows_avx512});
#endif
  return found;
}

// Not a Hadamard matrix, which the loops need not know: any signs show a wrong index.
std::vector<float> signs(std::int64_t core) {
  std::vector<float> matrix(static_cast<std::size_t>(core * core));
  for (float& value : matrix) value = test::uniform(0, 1) ? 1.0f : -1.0f;
  return matrix;
}

float value(int kind, std::int64_t i) {
  switch (kind) {
    case 0: return i % 3 ? -0.0f : 0.0f;
    case 1: return i == 1 ? std::nanf("") : 1.0f;
    case 2: return (i % 2 ? -1.0f : 1.0f) * 1e-40f;
    case 3: return (i % 2 ? -1.0f : 1.0f) * 3e38f;
    default: return static_cast<float>(test::uniform(-1000, 1000)) / 64.0f;
  }
}

struct Work {
  float* data;
  explicit Work(std::int64_t n) {
    data = static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((n * 4 + 63) / 64 * 64)));
  }
  ~Work() { std::free(data); }
};

void check_levels(std::int64_t core, std::int64_t piece, DType dtype) {
  const std::int64_t rows = 3, n = core * piece, words = rows * n * (dtype == DType::float32 ? 2 : 1);
  const std::vector<float> matrix = signs(core);
  test::Guarded<std::uint16_t> x(words), expected(words), got(words);
  Work work(n);
  for (int kind = 0; kind < 6; ++kind) {
    for (std::int64_t i = 0; i < rows * n; ++i) store_float(x.data(), i, dtype, value(kind, i));
    for (const Level& level : levels()) {
      test::Guarded<std::uint16_t>& out = level.run == hadamard_rows_scalar ? expected : got;
      out.poison();
      const HadamardRows h{x.data(), out.data(), dtype, rows, n, core, matrix.data(), 1.0f / std::sqrt(static_cast<float>(n))};
      level.run(h, 0, rows, work.data);
      bool equal = true;
      for (std::int64_t i = 0; i < rows * n; ++i) {
        const float a = load_float(out.data(), i, dtype), b = load_float(expected.data(), i, dtype);
        equal = equal && (std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, 4) == 0);
      }
      EXPECT(equal, std::string(level.name) + " core=" + std::to_string(core) + " piece=" + std::to_string(piece) +
                        " kind=" + std::to_string(kind));
    }
  }
}

}  // namespace

TEST(hadamard_levels_equal_scalar) {
  for (const std::int64_t core : {1, 2, 4, 12, 20}) {
    for (const std::int64_t piece : {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096}) {
      if (core * piece > 20000) continue;
      for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) check_levels(core, piece, dtype);
    }
  }
}

TEST(hadamard_equals_the_dense_product) {
  const std::int64_t core = 12, piece = 64, n = core * piece;
  const std::vector<float> matrix = signs(core);
  std::vector<float> x(static_cast<std::size_t>(n)), y(x.size());
  for (float& v : x) v = static_cast<float>(test::uniform(-8, 8));
  EXPECT(hadamard(x.data(), y.data(), 1, n, core, matrix.data(), DType::float32) == Status::ok, "");
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (std::int64_t i = 0; i < n; ++i) {
    double sum = 0;  // of integers, so float32's is exact
    for (std::int64_t j = 0; j < n; ++j) {
      const int walsh = __builtin_popcountll(static_cast<unsigned long long>((i % piece) & (j % piece))) % 2 ? -1 : 1;
      sum += static_cast<double>(walsh * matrix[static_cast<std::size_t>(j / piece * core + i / piece)]) *
             x[static_cast<std::size_t>(j)];
    }
    EXPECT(y[static_cast<std::size_t>(i)] == static_cast<float>(sum) * scale, std::to_string(i));
  }
}

TEST(hadamard_may_work_in_place) {
  for (const std::int64_t core : {1, 4}) {
    const std::int64_t n = core * 64;
    const std::vector<float> matrix = signs(core);
    std::vector<float> x(static_cast<std::size_t>(n)), y(x.size());
    for (float& v : x) v = static_cast<float>(test::uniform(-1000, 1000)) / 64.0f;
    hadamard(x.data(), y.data(), 1, n, core, matrix.data(), DType::float32);
    hadamard(x.data(), x.data(), 1, n, core, matrix.data(), DType::float32);
    EXPECT(test::same(x.data(), y.data(), n), std::to_string(core));
  }
}

TEST(hadamard_refuses_what_does_not_fit) {
  std::vector<float> x(48, 1.0f), y(48), matrix(144, 1.0f);
  const auto run = [&](std::int64_t n, std::int64_t core, const float* m, DType dtype) {
    return hadamard(x.data(), y.data(), 1, n, core, m, dtype);
  };
  EXPECT(run(48, 12, matrix.data(), DType::float32) == Status::ok, "good");
  EXPECT(run(0, 1, nullptr, DType::float32) == Status::bad_shape, "n");
  EXPECT(run(48, 0, nullptr, DType::float32) == Status::bad_shape, "core");
  EXPECT(run(48, 1, nullptr, DType::float32) == Status::bad_shape, "48 is no power of two");
  EXPECT(run(48, 5, matrix.data(), DType::float32) == Status::bad_shape, "5 does not divide 48");
  EXPECT(run(48, 12, nullptr, DType::float32) == Status::null_pointer, "matrix");
  EXPECT(run(48, 12, matrix.data(), static_cast<DType>(3)) == Status::bad_dtype, "dtype");
}
