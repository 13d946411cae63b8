#include "spike_encode/spike_encode.h"

#include "core/isa.h"

namespace ranvier {

SpikeEncodeRow spike_encode_row() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return spike_encode_row_avx512;
  if (isa >= Isa::avx2) return spike_encode_row_avx2;
#endif
  return spike_encode_row_scalar;
}

}  // namespace ranvier
