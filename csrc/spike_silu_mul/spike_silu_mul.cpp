#include "spike_silu_mul/spike_silu_mul.h"

#include "core/isa.h"
#include "core/scratch.h"

namespace ranvier {
namespace {

struct Rows {
  const SiluMul* gated;
  SiluMulRow run;
};

const void* gated_row(const void* context, std::int64_t m) {
  const auto& [gated, run] = *static_cast<const Rows*>(context);
  const std::int64_t bytes = m * gated->K * (gated->dtype == DType::float32 ? 4 : 2);
  void* y = static_cast<char*>(gated->y) + bytes;
  run(static_cast<const char*>(gated->gate) + bytes, static_cast<const char*>(gated->up) + bytes, gated->dtype, gated->K, y);
  return y;
}

Status check(const SiluMul& g, const SpikeFormat& f, std::int64_t M) {
  if (g.K != f.K) return Status::bad_shape;
  return M > 0 && (g.gate == nullptr || g.up == nullptr || g.y == nullptr) ? Status::null_pointer : Status::ok;
}

const std::uint8_t* mask_of(const SpikeLayer& layer) { return reinterpret_cast<const std::uint8_t*>(layer.mask); }

}  // namespace

SiluMulRow silu_mul_row() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return silu_mul_row_avx512;
  if (isa >= Isa::avx2) return silu_mul_row_avx2;
#endif
  return silu_mul_row_scalar;
}

Status spike_silu_mul(const SiluMul& g, const SpikeFormat& f, const std::uint8_t* mask, std::int64_t M, std::int8_t* codes,
                      float* scale, std::int32_t* sums, std::int32_t* zero) {
  if (const Status s = check(g, f, M); s != Status::ok) return s;
  const Rows rows{&g, silu_mul_row()};
  return spike_encode(f, mask, SpikeSource{gated_row, &rows, g.dtype}, M, codes, scale, sums, zero);
}

Status spike_gated_mlp(const SpikeMlp& mlp, std::int64_t M) {
  if (mlp.gate.N != mlp.up.N || mlp.gate.N != mlp.down.format.K) return Status::bad_shape;
  static thread_local Scratch input, middle;
  const void* encoding = mlp.encoding;
  if (encoding == nullptr) {
    const SpikeFormat& f = mlp.gate.format;
    void* memory = input.reserve(static_cast<std::size_t>(spike_encoding_bytes(f, M)));
    if (memory == nullptr) return Status::out_of_memory;
    if (const Status s = spike_encode_panels(f, mask_of(mlp.gate), mlp.x, f.K, mlp.dtype, M, memory); s != Status::ok) return s;
    encoding = memory;
  }
  const std::int64_t size = mlp.dtype == DType::float32 ? 4 : 2;
  void* up = static_cast<char*>(mlp.hidden) + M * mlp.gate.N * size;
  if (const Status s = spike_linear_pair(mlp.gate, mlp.up, encoding, M, mlp.hidden, up, mlp.dtype); s != Status::ok) return s;
  void* codes = middle.reserve(static_cast<std::size_t>(spike_encoding_bytes(mlp.down.format, M)));
  if (codes == nullptr) return Status::out_of_memory;
  const SiluMul gated{mlp.hidden, up, mlp.dtype, mlp.gate.N, mlp.hidden};
  const Rows rows{&gated, silu_mul_row()};
  const SpikeSource source{gated_row, &rows, mlp.dtype};
  if (const Status s = spike_encode_panels(mlp.down.format, mask_of(mlp.down), source, M, codes); s != Status::ok) return s;
  return spike_linear_panels(mlp.down, codes, M, mlp.y, mlp.dtype);
}

}  // namespace ranvier
