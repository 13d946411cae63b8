#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/cpu_features.h"

namespace ranvier {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"};

Isa level_of(const CpuFeatures& f) {
  if (!(f.avx2 && f.fma && f.f16c)) return Isa::scalar;
  if (!f.avx512_base) return Isa::avx2;
  if (!f.avx512_vnni) return Isa::avx512;
  return f.avx512_bf16 ? Isa::avx512bf16 : Isa::avx512vnni;
}

Isa initial() {
  Isa cap = Isa::avx512bf16;
  const char* wanted = std::getenv("RANVIER_ISA");
  if (wanted != nullptr) parse_isa(wanted, &cap);
  const Isa found = detected_isa();
  return cap < found ? cap : found;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> level{initial()};
  return level;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa detected_isa() {
  static const Isa level = level_of(cpu_features());
  return level;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

Isa set_isa(Isa isa) {
  const Isa level = isa < detected_isa() ? isa : detected_isa();
  active().store(level, std::memory_order_relaxed);
  return level;
}

}  // namespace ranvier
