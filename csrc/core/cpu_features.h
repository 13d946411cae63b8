// What this processor executes and what the operating system lets it keep across a context switch.
#pragma once

#include <cstdint>
#include <string>

namespace ranvier {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512_base = false;  // F, CD, BW, DQ and VL together
  bool avx512_vnni = false, avx512_bf16 = false;
  std::uint64_t xcr0 = 0;
  std::string brand;
};

const CpuFeatures& cpu_features();

}  // namespace ranvier
