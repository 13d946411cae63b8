// The dot-product loop in AVX2: vpmaddubsw and the 16-bit addition that goes with it.
#include <immintrin.h>

#include "machine/machine.h"

namespace ranvier {

extern "C" std::int64_t machine_dot_avx2(std::int64_t iterations) {
  const __m256i s = _mm256_set1_epi8(-1);
  __m256i u = _mm256_set1_epi8(3);
#define RANVIER_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define RANVIER_ZERO(i) __m256i a##i = _mm256_setzero_si256();
  RANVIER_CHAINS(RANVIER_ZERO)
  for (std::int64_t k = 0; k < iterations; ++k) {
    // The empty asm keeps the products inside the loop.
#define RANVIER_DOT(i)            \
  __asm__ volatile("" : "+x"(u)); \
  a##i = _mm256_add_epi16(a##i, _mm256_maddubs_epi16(u, s));
    RANVIER_CHAINS(RANVIER_DOT)
  }
#define RANVIER_KEEP(i) __asm__ volatile("" ::"x"(a##i));
  RANVIER_CHAINS(RANVIER_KEEP)
  return iterations * 8 * 32;
}

}  // namespace ranvier
