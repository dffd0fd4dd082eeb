// The instruction vdpbf16ps as Intel's manual defines it: odd elements first, each product and sum rounded once, to
// nearest, denormal numbers taken for zero. test_step_compiled.py puts it in the place of the instruction.
#include <immintrin.h>
#include <string.h>
#define __AVX512BF16__ 1
static inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }
static inline float wide(unsigned short bits) {
  unsigned at = (unsigned)bits << 16;
  float x;
  memcpy(&x, &at, 4);
  return flushed(x);
}
static __attribute__((noinline)) __m512 as_vdpbf16ps(__m512 sums, __m512bh a, __m512bh b) {
  unsigned short x[32], y[32];
  float z[16];
  memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &sums, 64);
  for (int i = 0; i < 16; i++)
    for (int j = 1; j >= 0; j--) z[i] = flushed(__builtin_fmaf(wide(x[2 * i + j]), wide(y[2 * i + j]), flushed(z[i])));
  memcpy(&sums, z, 64);
  return sums;
}
#define _mm512_dpbf16_ps as_vdpbf16ps
