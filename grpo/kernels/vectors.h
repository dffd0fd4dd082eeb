// Vectors of floats as wide as the CPU's, for the C++ beside this file (compiled by native.py at first use).
#pragma once

#include <cstdint>
#include <cstring>

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12;  // floats of a vector; rows of a product's tile: 24 sums stay in registers
#else
constexpr int W = 8, ROWS = 6;
#endif
constexpr int PANEL = 2 * W;  // columns of a tile

typedef float V __attribute__((vector_size(W * 4)));
typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
typedef uint16_t Half __attribute__((vector_size(W * 2)));

struct bfloat16 {
  uint16_t bits;
};

static inline V load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
static inline void store(float *p, V v) { *reinterpret_cast<Unaligned *>(p) = v; }

static inline V from_bits(Bits bits) {
  V v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

static inline V load(const bfloat16 *p) {
  Half bits;
  memcpy(&bits, p, sizeof bits);
  return from_bits(__builtin_convertvector(bits, Bits) << 16);
}

static inline void store(bfloat16 *p, V v) {  // to the nearest, ties to even
  Bits bits;
  memcpy(&bits, &v, sizeof bits);
  Half half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Half);
  memcpy(p, &half, sizeof half);
}

// Lanes 2i + ``odd`` of a, then those of b.
static inline V lanes(V a, V b, int odd) {
  Int which;
  for (int i = 0; i < W; i++) which[i] = 2 * i + odd;
  return __builtin_shuffle(a, b, which);
}

// Lane j of the result is the sum of v[j]'s lanes.
static inline V sums_of(V (&v)[W]) {
#pragma GCC unroll 16
  for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) v[i] = lanes(v[2 * i], v[2 * i + 1], 0) + lanes(v[2 * i], v[2 * i + 1], 1);
  return v[0];
}

static inline float sum_of(V v) {
#pragma GCC unroll 16
  for (int n = W / 2; n; n /= 2) v = lanes(v, v, 0) + lanes(v, v, 1);
  return v[0];
}

// The largest of n floats and of the floats behind them up to a whole vector.
static inline float largest_of(const float *x, int n) {
  V most = load(x);
  for (int i = W; i < n; i += W) {
    V v = load(x + i);
    most = v > most ? v : most;
  }
  float largest = most[0];
  for (int i = 1; i < W; i++) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// exp to about two units in the last place; below -87 it is 1e-38, above 88 it stays there.
static inline V exp_of(V x) {
  const V low = V{} - 87.0f, high = V{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  V n = (x * 1.44269504f + magic) - magic;
  V r = x - n * 0.693145752f - n * 1.42860677e-6f;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Int power = (__builtin_convertvector(n, Int) + 127) << 23;
  V scale;
  memcpy(&scale, &power, sizeof scale);
  return p * scale;
}
