// The dot-product and read loops in AVX-512: 12 independent chains of vpdpbusd, then one 64-byte load per line.
#include <immintrin.h>

#include "machine/machine.h"

namespace ranvier {

extern "C" std::int64_t machine_dot_avx512vnni(std::int64_t iterations) {
  const __m512i u = _mm512_set1_epi8(3), s = _mm512_set1_epi8(-1);
#define RANVIER_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define RANVIER_ZERO(i) __m512i a##i = _mm512_setzero_si512();
  RANVIER_CHAINS(RANVIER_ZERO)
  for (std::int64_t k = 0; k < iterations; ++k) {
    // The empty asm keeps the compiler from folding the loop into one multiplication.
#define RANVIER_DOT(i)                    \
  a##i = _mm512_dpbusd_epi32(a##i, u, s); \
  __asm__ volatile("" : "+v"(a##i));
    RANVIER_CHAINS(RANVIER_DOT)
  }
#define RANVIER_KEEP(i) __asm__ volatile("" ::"v"(a##i));
  RANVIER_CHAINS(RANVIER_KEEP)
  return iterations * 12 * 64;
}

extern "C" std::int64_t machine_read_avx512(const void* data, std::int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (std::int64_t k = 0; k + 256 <= bytes; k += 256) {
    _mm_prefetch(at + k + 1024, _MM_HINT_T0);
    _mm_prefetch(at + k + 1088, _MM_HINT_T0);
    _mm_prefetch(at + k + 1152, _MM_HINT_T0);
    _mm_prefetch(at + k + 1216, _MM_HINT_T0);
    a = _mm512_xor_si512(a, _mm512_loadu_si512(at + k));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(at + k + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(at + k + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(at + k + 192));
  }
  return _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}

}  // namespace ranvier
