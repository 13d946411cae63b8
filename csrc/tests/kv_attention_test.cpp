// kv_attention: every level writes the scalar level's bits from blocks that end at a page nobody may touch, at the largest
// codes too; what does not fit is refused before anything is read.
#include "kv_attention/kv_attention.h"

#include <cmath>

#include "core/isa.h"
#include "tests/test.h"

using namespace ranvier;

namespace {

struct Level {
  const char* name;
  KvAttentionChunk run;
};

std::vector<Level> levels() {
  std::vector<Level> found{{"scalar", kv_attention_chunk_scalar}};
#if defined(RANVIER_X86)
  if (detected_isa() >= Isa::avx2) found.push_back({"avx2", kv_attention_chunk_avx2});
  if (detected_isa() >= Isa::avx512vnni) found.push_back({"avx512vnni", kv_attention_chunk_avx512vnni});
#endif
  return found;
}

enum class Fill { random, largest, not_finite };

void fill(const KvFormat& f, std::int64_t blocks, Fill kind, std::uint8_t* bytes) {
  for (std::int64_t i = 0; i < blocks * f.block_bytes(); ++i) {
    bytes[i] = kind == Fill::largest ? 0xff : static_cast<std::uint8_t>(test::uniform(0, 255));
  }
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (const std::int64_t at : {f.key_scale(), f.key_zero(), f.value_scale(), f.value_zero()}) {
      for (std::int64_t t = 0; t < kKvTokens; ++t) {
        std::uint16_t half = float_to_half(static_cast<float>(test::uniform(1, 1000)) * 1e-3f);
        if (kind == Fill::largest) half = 0x7bff;
        if (kind == Fill::not_finite && test::uniform(0, 40) == 0) half = 0x7e00;
        std::memcpy(bytes + b * f.block_bytes() + at + 2 * t, &half, 2);
      }
    }
  }
}

struct Result {
  std::vector<test::Guarded<float>*> out;
  std::vector<KvPartial> partials;

  Result(std::int64_t rows, std::int64_t Dp) {
    for (std::int64_t i = 0; i < rows; ++i) {
      out.push_back(new test::Guarded<float>(Dp));
      partials.push_back({0.0f, 0.0f, 0, out.back()->data()});
    }
  }
  ~Result() {
    for (auto* row : out) delete row;
  }
  Result(const Result&) = delete;
};

void check(const KvFormat& f, std::int64_t tokens, Fill kind) {
  const std::int64_t blocks = (tokens + kKvTokens - 1) / kKvTokens, Dp = f.padded(), rows = 3;
  test::Guarded<std::uint8_t> cache(blocks * f.block_bytes());
  fill(f, blocks, kind, cache.data());
  test::Guarded<std::int8_t> codes(2 * Dp * rows);
  test::Guarded<float> mask(tokens);
  for (std::int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::int8_t>(test::uniform(-127, 127));
  if (kind == Fill::largest) std::memset(codes.data(), 127, static_cast<std::size_t>(2 * Dp));
  for (std::int64_t t = 0; t < tokens; ++t) {
    mask[t] = test::uniform(0, 3) == 0 ? -INFINITY : static_cast<float>(test::uniform(-100, 100)) * 0.1f;
  }
  std::vector<KvQuery> queries;
  for (std::int64_t i = 0; i < rows; ++i) {
    const float step = kind == Fill::largest ? 1e-12f : 1e-6f * static_cast<float>(i + 1);
    const std::int8_t* high = codes.data() + 2 * Dp * i;
    queries.push_back(
        {high, high + Dp, step, step * 1000.0f, i * (tokens / 3), tokens - i, i == 1 ? mask.data() : nullptr, false});
  }
  Result expected(rows, Dp), got(rows, Dp);
  for (const Level& level : levels()) {
    Result& r = level.run == kv_attention_chunk_scalar ? expected : got;
    for (auto* row : r.out) row->poison();
    level.run({f, cache.data(), 0, tokens}, queries.data(), rows, r.partials.data());
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto n = static_cast<std::size_t>(i);
      const KvPartial &a = r.partials[n], &b = expected.partials[n];
      const bool equal =
          test::same(&a.max, &b.max, 1) && test::same(&a.sum, &b.sum, 1) && a.bad == b.bad && test::same(a.out, b.out, Dp);
      EXPECT(equal, std::string(level.name) + " D=" + std::to_string(f.D) + " tokens=" + std::to_string(tokens) + " salient=" +
                        std::to_string(f.key_salient) + "," + std::to_string(f.value_salient) + " row " + std::to_string(i));
      if (kind != Fill::not_finite) EXPECT(a.bad == 0, level.name);
    }
  }
}

}  // namespace

TEST(kv_attention_levels_equal_scalar) {
  for (const std::int64_t D : {1, 16, 32, 33, 64, 96, 128, 160, 256, 512}) {
    for (const std::int64_t salient : {std::int64_t{0}, D / 10, D / 5, D}) {
      for (const std::int64_t tokens : {1, 3, 16, 63, 64, 65, 200}) {
        for (const Fill kind : {Fill::random, Fill::largest, Fill::not_finite}) check({D, salient, D - salient}, tokens, kind);
      }
    }
  }
}

TEST(kv_append_and_attention_refuse_what_does_not_fit) {
  const KvFormat f{32, 3, 3};
  std::vector<std::uint8_t> cache(static_cast<std::size_t>(f.block_bytes())), mask(32, 0), full(32, 1);
  std::vector<float> rows(4 * 32, 1.0f), steps(8), out(32);
  std::vector<std::int64_t> at{0}, length{4}, late{61}, long_{65};
  const auto address = [](auto& v) { return reinterpret_cast<std::int64_t>(v.data()); };
  const KvAppend good{f,
                      1,
                      1,
                      4,
                      1,
                      0,
                      0,
                      address(cache),
                      address(mask),
                      address(mask),
                      address(rows),
                      {128, 128, 32},
                      address(rows),
                      {128, 128, 32},
                      address(at),
                      address(steps)};
  EXPECT(kv_append(good) == Status::ok, "append");
  KvAppend bad = good;
  bad.positions = address(late);
  EXPECT(kv_append(bad) == Status::bad_shape, "position");
  bad = good, bad.key_mask = address(full);
  EXPECT(kv_append(bad) == Status::bad_mask, "mask");
  bad = good, bad.format.D = 513;
  EXPECT(kv_append(bad) == Status::bad_shape, "D");
  bad = good, bad.cache = 0;
  EXPECT(kv_append(bad) == Status::null_pointer, "cache");
  const KvAttention read{f,
                         1,
                         1,
                         1,
                         1,
                         1,
                         0,
                         address(cache),
                         address(mask),
                         address(mask),
                         address(rows),
                         {32, 32, 32},
                         address(length),
                         0,
                         0,
                         {0, 0, 0},
                         0,
                         address(out)};
  EXPECT(kv_attention(read, 1.0f) == Status::ok && out[0] == out[0], "attention");
  KvAttention wrong = read;
  wrong.lengths = address(long_);
  EXPECT(kv_attention(wrong, 1.0f) == Status::bad_shape, "length");
  wrong = read, wrong.value_mask = address(full);
  EXPECT(kv_attention(wrong, 1.0f) == Status::bad_mask, "mask");
  wrong = read, wrong.kv_heads = 2;
  EXPECT(kv_attention(wrong, 1.0f) == Status::bad_shape, "heads");
}
