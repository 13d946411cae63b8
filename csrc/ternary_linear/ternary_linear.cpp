// The calls of ternary_linear that spike_linear's do not serve: the choice of a kernel, and codes in the layer's own order.
#include "ternary_linear/ternary_linear.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace ranvier {
namespace {

// One token's codes, ordinary channels first, and their sums.
void split_token(const SpikeFormat& f, const std::uint8_t* mask, const std::int8_t* from, std::int8_t* to, std::int32_t* sums) {
  std::int8_t* next[2] = {to, to + f.low};
  std::int32_t sum[2] = {0, 0};
  for (std::int64_t k = 0; k < f.K; ++k) {
    const int r = f.ranges == 2 && mask[k] != 0;
    *next[r]++ = from[k];
    sum[r] += from[k];
  }
  for (std::int64_t r = 0; r < f.ranges; ++r) sums[r] = sum[r];
}

Status check_mask(const SpikeFormat& f, const std::uint8_t* mask) {
  if (f.ranges == 1) return Status::ok;
  if (mask == nullptr) return Status::null_pointer;
  std::int64_t marked = 0;
  for (std::int64_t k = 0; k < f.K; ++k) marked += mask[k] != 0;
  return marked == f.K - f.low ? Status::ok : Status::bad_mask;
}

}  // namespace

SpikeLinearBlock ternary_linear_block() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512vnni) return ternary_linear_block_avx512vnni;
  if (isa >= Isa::avx2) return ternary_linear_block_avx2;
#endif
  return ternary_linear_block_scalar;
}

bool is_ternary_format(const SpikeFormat& f) {
  return f.group == 0 && f.compat == 0 && f.separate == 0 && f.steps == 1 && f.ranges == (f.low > 0 && f.low < f.K ? 2 : 1);
}

Status ternary_linear(const SpikeLayer& layer, const std::int8_t* codes, const float* scale, std::int64_t M, void* y,
                      DType y_dtype) {
  const SpikeFormat& f = layer.format;
  if (layer.weight_bits != 2 || !is_ternary_format(f)) return Status::bad_shape;
  if (M > 0 && (codes == nullptr || scale == nullptr)) return Status::null_pointer;
  const auto* mask = reinterpret_cast<const std::uint8_t*>(layer.mask);
  if (const Status s = check_mask(f, mask); s != Status::ok) return s;
  static thread_local Scratch scratch;
  const std::int64_t words = M * f.ranges;
  void* memory = scratch.reserve(static_cast<std::size_t>(8 * words + M * f.K));
  if (memory == nullptr) return Status::out_of_memory;
  float* scales = static_cast<float*>(memory);
  auto* sums = reinterpret_cast<std::int32_t*>(scales + words);
  auto* split = reinterpret_cast<std::int8_t*>(sums + words);
  parallel_tasks(M, M * f.K < 32'768, [&](std::int64_t m) {
    split_token(f, mask, codes + m * f.K, split + m * f.K, sums + m * f.ranges);
    for (std::int64_t r = 0; r < f.ranges; ++r) scales[m * f.ranges + r] = scale[m];
  });
  return spike_linear(layer, split, scales, sums, nullptr, M, y, y_dtype);
}

}  // namespace ranvier
