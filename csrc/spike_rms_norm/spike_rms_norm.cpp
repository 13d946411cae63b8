#include "spike_rms_norm/spike_rms_norm.h"

#include "core/isa.h"
#include "core/parallel.h"

namespace ranvier {
namespace {

constexpr std::int64_t kSerialChannels = 32'768;  // below, waking a second thread costs more than it saves

struct Rows {
  const RmsNorm* norm;
  RmsNormRow run;
};

std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

const void* norm_row(const void* context, std::int64_t m) {
  const auto& [norm, run] = *static_cast<const Rows*>(context);
  const std::int64_t size = size_of(norm->dtype);
  void* y = static_cast<char*>(norm->y) + m * norm->K * size;
  run(*norm, static_cast<const char*>(norm->x) + m * norm->stride * size, y);
  return y;
}

Status check(const RmsNorm& n, const SpikeFormat* f, std::int64_t M) {
  if (n.K <= 0 || (f != nullptr && f->K != n.K)) return Status::bad_shape;
  if (M > 0 && (n.x == nullptr || n.weight == nullptr || n.y == nullptr)) return Status::null_pointer;
  return Status::ok;
}

}  // namespace

RmsNormRow rms_norm_row() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return rms_norm_row_avx512;
  if (isa >= Isa::avx2) return rms_norm_row_avx2;
#endif
  return rms_norm_row_scalar;
}

Status rms_norm(const RmsNorm& n, std::int64_t M) {
  if (const Status s = check(n, nullptr, M); s != Status::ok) return s;
  const Rows rows{&n, rms_norm_row()};
  parallel_tasks(M, M * n.K < kSerialChannels, [&](std::int64_t m) { norm_row(&rows, m); });
  return Status::ok;
}

Status spike_rms_norm(const RmsNorm& n, const SpikeFormat& f, const std::uint8_t* mask, std::int64_t M, std::int8_t* codes,
                      float* scale, std::int32_t* sums, std::int32_t* zero) {
  if (const Status s = check(n, &f, M); s != Status::ok) return s;
  const Rows rows{&n, rms_norm_row()};
  return spike_encode(f, mask, SpikeSource{norm_row, &rows, n.dtype}, M, codes, scale, sums, zero);
}

Status spike_rms_norm_panels(const RmsNorm& n, const SpikeFormat& f, const std::uint8_t* mask, std::int64_t M, void* encoding) {
  if (const Status s = check(n, &f, M); s != Status::ok) return s;
  const Rows rows{&n, rms_norm_row()};
  return spike_encode_panels(f, mask, SpikeSource{norm_row, &rows, n.dtype}, M, encoding);
}

}  // namespace ranvier
