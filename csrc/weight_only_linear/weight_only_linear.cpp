#include "weight_only_linear/weight_only_linear.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "ternary_linear/ternary_linear.h"

namespace ranvier {
namespace {

// Tokens whose digits and float sums are held at a time: enough rows for the product to be bound by arithmetic.
constexpr std::int64_t kTokens = 128, kSerialChannels = 32'768;

struct Buffers {
  float* sums_of_products;  // [tokens, digits, N]
  float* scale;             // [tokens, digits]
  std::int32_t* sums;       // [tokens, digits, groups]
  std::int8_t* codes;       // [tokens, digits, K]
};

const char* offset(const void* base, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * (dtype == DType::float32 ? 4 : 2);
}

// y = ((lowest digit's product + next) + next) + bias, in this order on every level.
void add_digits(const SpikeLayer& layer, const float* products, std::int64_t digits, void* y, std::int64_t row, DType y_dtype) {
  const auto* bias = reinterpret_cast<const void*>(layer.bias);
  for (std::int64_t n = 0; n < layer.N; ++n) {
    float value = products[n];
    for (std::int64_t p = 1; p < digits; ++p) value += products[p * layer.N + n];
    if (bias != nullptr) value += load_float(bias, n, static_cast<DType>(layer.bias_dtype));
    store_float(y, row * layer.N + n, y_dtype, value);
  }
}

}  // namespace

EncodeDigits encode_digits() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return encode_digits_avx512;
  if (isa >= Isa::avx2) return encode_digits_avx2;
#endif
  return encode_digits_scalar;
}

Status weight_only_linear(const SpikeLayer& layer, const void* x, std::int64_t x_stride, DType dtype, std::int64_t M,
                          std::int64_t digits, void* y, DType y_dtype) {
  const SpikeFormat& f = layer.format;
  const bool two_bit = layer.weight_bits == 2;
  if (two_bit ? !is_ternary_format(f) : f.ranges != 1) return Status::bad_shape;
  if (f.act_bits != 8 || f.separate != 0 || f.compat != 0 || f.K <= 0) return Status::bad_shape;
  if (digits < 1 || digits > kMostDigits) return Status::bad_shape;
  if (M > 0 && (x == nullptr || y == nullptr)) return Status::null_pointer;
  const std::int64_t tokens = M < kTokens ? M : kTokens, rows = tokens * digits, groups = f.group_count();
  static thread_local Scratch scratch;
  const std::int64_t floats = rows * (layer.N + 1 + groups);
  char* memory = static_cast<char*>(scratch.reserve(static_cast<std::size_t>(4 * floats + rows * f.K)));
  if (memory == nullptr) return Status::out_of_memory;
  Buffers b{};
  b.sums_of_products = reinterpret_cast<float*>(memory);
  b.scale = b.sums_of_products + rows * layer.N;
  b.sums = reinterpret_cast<std::int32_t*>(b.scale + rows);
  b.codes = reinterpret_cast<std::int8_t*>(b.sums + rows * groups);
  SpikeLayer product = layer;
  product.bias = 0;
  const EncodeDigits encode = encode_digits();
  for (std::int64_t begin = 0; begin < M; begin += tokens) {
    const std::int64_t count = M - begin < tokens ? M - begin : tokens;
    parallel_tasks(count, count * f.K < kSerialChannels, [&](std::int64_t i) {
      encode(DigitRow{offset(x, (begin + i) * x_stride, dtype), dtype, f.K, digits, f.group, b.codes + i * digits * f.K,
                      b.scale + i * digits, b.sums + i * digits * groups});
    });
    const std::int64_t given = count * digits;
    const Status status =
        two_bit ? ternary_linear(product, b.codes, b.scale, given, b.sums_of_products, DType::float32)
                : spike_linear(product, b.codes, b.scale, b.sums, nullptr, given, b.sums_of_products, DType::float32);
    if (status != Status::ok) return status;
    parallel_tasks(count, count * layer.N < kSerialChannels, [&](std::int64_t i) {
      add_digits(layer, b.sums_of_products + i * digits * layer.N, digits, y, begin + i, y_dtype);
    });
  }
  return Status::ok;
}

}  // namespace ranvier
