// flash_attention: every level equals the scalar twin bit for bit, attention in double within rounding, nothing read or written
// beyond the tensors.
#include "flash_attention/flash_attention.h"

#include <cmath>

#include "core/isa.h"
#include "test.h"

namespace {

using namespace ranvier;

struct Shape {
  std::int64_t batch, heads, kv_heads, queries, keys, D;
};

// [batch][heads][tokens][D] behind and before pages that nobody may touch.
struct Tensor {
  Shape s;
  std::int64_t heads, tokens;
  test::Guarded<float> data;
  Tensor(const Shape& shape, std::int64_t h, std::int64_t t)
      : s(shape), heads(h), tokens(t), data(shape.batch * h * t * shape.D) {}
  void fill() {
    for (std::int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(test::uniform(-64, 64)) / 32.0f;
  }
  void set(std::int64_t& address, std::int64_t* stride) const {
    address = data.address();
    stride[0] = heads * tokens * s.D, stride[1] = tokens * s.D, stride[2] = s.D;
  }
  const float* row(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return data.data() + ((b * heads + h) * tokens + t) * s.D;
  }
};

struct Problem {
  Shape s;
  Tensor q, k, v, out;
  explicit Problem(const Shape& shape)
      : s(shape),
        q(shape, shape.heads, shape.queries),
        k(shape, shape.kv_heads, shape.keys),
        v(shape, shape.kv_heads, shape.keys),
        out(shape, shape.heads, shape.queries) {
    q.fill(), k.fill(), v.fill();
  }
  FlashAttention call(bool causal) const {
    FlashAttention c{s.batch, s.heads, s.kv_heads, s.queries, s.keys, s.D, 0, causal, 0, {}, 0, {}, 0, {}, 0, {}};
    q.set(c.q, c.q_stride), k.set(c.k, c.k_stride), v.set(c.v, c.v_stride), out.set(c.out, c.out_stride);
    return c;
  }
};

double exact(const Problem& p, bool causal, double scale, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
  const std::int64_t seen = causal ? p.s.keys - p.s.queries + i + 1 : p.s.keys, kv = h / (p.s.heads / p.s.kv_heads);
  double sum = 0, value = 0;
  for (std::int64_t j = 0; j < seen; ++j) {
    double dot = 0;
    for (std::int64_t e = 0; e < p.s.D; ++e) dot += static_cast<double>(p.q.row(b, h, i)[e]) * p.k.row(b, kv, j)[e];
    const double weight = std::exp(scale * dot);
    sum += weight;
    value += weight * p.v.row(b, kv, j)[d];
  }
  return value / sum;
}

void check(const Shape& shape, bool causal) {
  Problem p(shape);
  const float scale = 0.125f;
  std::vector<float> first;
  for (const Isa level : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (level > detected_isa()) continue;
    set_isa(level);
    p.out.data.poison();
    const std::string name = std::to_string(static_cast<int>(level)) + " D=" + std::to_string(shape.D);
    EXPECT(flash_attention(p.call(causal), scale) == Status::ok, name);
    const float* y = p.out.data.data();
    if (first.empty()) {
      first.assign(y, y + p.out.data.size());
      for (std::int64_t n = 0; n < p.out.data.size(); n += 7) {
        const std::int64_t d = n % shape.D, i = n / shape.D % shape.queries, h = n / shape.D / shape.queries % shape.heads;
        const double truth = exact(p, causal, scale, n / shape.D / shape.queries / shape.heads, h, i, d);
        // Logits up to 0.125 * 4 D, each off by D + 6 roundings; values up to 2.
        const double logit = 0.5 * static_cast<double>(shape.D), unit = std::ldexp(1.0, -24);
        EXPECT(std::fabs(y[n] - truth) <= 8 * logit * static_cast<double>(shape.D + 6) * unit + 1e-5, name);
      }
    }
    EXPECT(test::same(y, first.data(), p.out.data.size()), name);
  }
  set_isa(detected_isa());
}

}  // namespace

TEST(flash_attention_levels_equal_scalar) {
  for (const bool causal : {true, false}) {
    check({1, 1, 1, 1, 1, 1}, causal);
    check({1, 2, 1, 7, 9, 15}, causal);
    check({2, 4, 2, 61, 70, 16}, causal);
    check({1, 3, 1, 66, 66, 33}, causal);
    check({1, 1, 1, 5, 130, 64}, causal);
    check({1, 1, 1, 120, 128, 80}, causal);
  }
}

TEST(flash_attention_refuses_what_does_not_fit) {
  const Problem p({1, 2, 1, 3, 5, 8});
  const auto with = [&](auto change) {
    FlashAttention c = p.call(true);
    change(c);
    return flash_attention(c, 1.0f);
  };
  EXPECT(with([](auto&) {}) == Status::ok, "good");
  EXPECT(with([](auto& c) { c.D = 0; }) == Status::bad_shape, "D");
  EXPECT(with([](auto& c) { c.D = 513; }) == Status::bad_shape, "D");
  EXPECT(with([](auto& c) { c.heads = 3, c.kv_heads = 2; }) == Status::bad_shape, "heads");
  EXPECT(with([](auto& c) { c.kv_heads = 0; }) == Status::bad_shape, "kv heads");
  EXPECT(with([](auto& c) { c.keys = 2; }) == Status::bad_shape, "fewer keys than causal queries");
  EXPECT(with([](auto& c) { c.keys = 0, c.causal = 0; }) == Status::bad_shape, "no keys");
  EXPECT(with([](auto& c) { c.causal = 2; }) == Status::bad_shape, "causal");
  EXPECT(with([](auto& c) { c.dtype = 3; }) == Status::bad_dtype, "dtype");
  EXPECT(with([](auto& c) { c.v = 0; }) == Status::null_pointer, "value");
  EXPECT(with([](auto& c) { c.queries = 0, c.q = 0; }) == Status::ok, "no queries");
}
