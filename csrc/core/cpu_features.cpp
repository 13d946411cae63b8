#include "core/cpu_features.h"

#if defined(RANVIER_X86)
#include <cpuid.h>
#include <cstring>
#endif

namespace ranvier {
namespace {

#if defined(RANVIER_X86)

// XCR0 bits: 1 SSE, 2 AVX; 5 opmask, 6 upper halves of zmm0-15, 7 zmm16-31.
constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6;

std::uint64_t read_xcr0() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

std::string read_brand() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0x80000000u, &a, &b, &c, &d) || a < 0x80000004u) return "";
  char text[49] = {0};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned words[4];
    __get_cpuid(0x80000002u + leaf, &words[0], &words[1], &words[2], &words[3]);
    std::memcpy(text + 16 * leaf, words, 16);
  }
  std::string brand(text);
  const auto last = brand.find_last_not_of(' ');
  return last == std::string::npos ? "" : brand.substr(0, last + 1);
}

CpuFeatures probe() {
  CpuFeatures f;
  f.brand = read_brand();
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return f;  // no OSXSAVE: XCR0 cannot be read
  f.xcr0 = read_xcr0();
  const bool avx_state = (f.xcr0 & kAvxState) == kAvxState;
  const bool avx512_state = (f.xcr0 & kAvx512State) == kAvx512State;
  f.fma = avx_state && bit(c, 12);
  f.f16c = avx_state && bit(c, 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = avx_state && bit(b, 5);
  f.avx512_base = avx512_state && bit(b, 16) && bit(b, 17) && bit(b, 28) && bit(b, 30) && bit(b, 31);
  f.avx512_vnni = avx512_state && bit(c, 11);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = avx512_state && bit(a, 5);
  return f;
}

#else

CpuFeatures probe() { return CpuFeatures{}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = probe();
  return features;
}

}  // namespace ranvier
