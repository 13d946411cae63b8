// The instruction-set levels of the library and the one in use.
//
// A level is available when cpuid reports its instructions *and* XCR0 says that the operating system saves their
// registers. RANVIER_ISA, read once, lowers the level; set_isa() lowers or restores it inside a process (tests, benchmarks).
#pragma once

namespace ranvier {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, avx512bf16 = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);
bool parse_isa(const char* name, Isa* isa);

Isa detected_isa();
Isa active_isa();
// Clamped to what the machine has; returns the level now in use.
Isa set_isa(Isa isa);

}  // namespace ranvier
