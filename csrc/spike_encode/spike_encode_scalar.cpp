// spike_encode, any processor: the rule in plain C++.
#include "spike_encode/spike_quantizer.h"

namespace ranvier {
namespace {

TokenExtremes extremes(const SpikeFormat& f, const SpikeRow& row) {
  // Centred codes need a range that includes zero; compat takes the released quantizer's raw range.
  const float inf = __builtin_inff();
  TokenExtremes e{f.compat ? inf : 0.0f, f.compat ? -inf : 0.0f, 0.0f, true};
  for (std::int64_t k = 0; k < f.K; ++k) {
    const float x = load_float(row.x, k, row.dtype);
    if ((bits_of(x) & 0x7fffffffu) >= 0x7f800000u) e.finite = false;
    if (f.separate && row.mask != nullptr && row.mask[k]) {
      e.salient_max = __builtin_fmaxf(e.salient_max, __builtin_fabsf(x));
    } else {
      e.low_min = __builtin_fminf(e.low_min, x);
      e.low_max = __builtin_fmaxf(e.low_max, x);
    }
  }
  return e;
}

std::int8_t code(const Quantizer& q, float x) {
  const float u = __builtin_fminf(__builtin_fmaxf(__builtin_rintf(x / q.step) + q.zero, q.floor), q.ceiling);
  return static_cast<std::int8_t>((u - q.centre) * q.gain);
}

}  // namespace

extern "C" void spike_encode_row_scalar(const SpikeFormat& f, const SpikeRow& row) {
  const TokenExtremes e = extremes(f, row);
  if (!e.finite) return write_not_finite(f, row);
  const TokenQuantizers q = token_quantizers(f, e);
  std::int8_t* low = row.codes;
  std::int8_t* salient = row.codes + row.salient_offset;
  for (std::int64_t k = 0; k < f.K; ++k) {
    const bool is_salient = row.mask != nullptr && row.mask[k];
    const std::int8_t c = code(is_salient ? q.salient : q.low, load_float(row.x, k, row.dtype));
    *(is_salient && f.ranges == 2 ? salient++ : low++) = c;
  }
  write_token(f, row, q);
  for_each_group(f, row, [&](const std::int8_t* codes, std::int64_t count, std::int64_t index) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < count; ++k) sum += codes[k];
    row.sums[index] = sum;
  });
}

}  // namespace ranvier
