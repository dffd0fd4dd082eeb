// The elementwise work of a decoder's update on a CPU, forward and backward, each in one pass over memory: root mean
// square norms and the product of gated MLPs. T is float, or bfloat16 (sums are float32). Compiled by native.py.

#include "vectors.h"

template <typename T>
static inline V load_some(const T *p, int64_t n) {
  if (n >= W) return load(p);
  T held[W] = {};
  memcpy(held, p, n * sizeof(T));
  return load(held);
}

template <typename T>
static inline void store_some(T *p, V v, int64_t n) {
  if (n >= W) return store(p, v);
  T held[W];
  store(held, v);
  memcpy(p, held, n * sizeof(T));
}

// out = x r w with r = (mean(x^2) + eps)^-1/2, for N rows of H floats.
static void norm(const float *x, const float *weight, float eps, int64_t N, int H, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    const float *row = x + n * H;
    V squares{};
    for (int i = 0; i < H; i += W) squares += load(row + i) * load(row + i);
    const float r = 1.0f / __builtin_sqrtf(sum_of(squares) / H + eps);
    for (int i = 0; i < H; i += W) store(out + n * H + i, load(row + i) * r * load(weight + i));
  }
}

// With s = sum(g w x): dx = r (g w - x r^2 s / H), dw = sum over rows of g x r. Each thread sums dw into its own row.
static void norm_gradient(const float *x, const float *weight, const float *grad, float eps, int64_t N, int H,
                          float *dx, float *dw, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float *mine = dw + static_cast<int64_t>(omp_get_thread_num()) * H;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      const float *row = x + n * H, *g = grad + n * H;
      V squares{}, products{};
      for (int i = 0; i < H; i += W) {
        V value = load(row + i);
        squares += value * value;
        products += value * load(weight + i) * load(g + i);
      }
      const float r = 1.0f / __builtin_sqrtf(sum_of(squares) / H + eps), share = r * r * sum_of(products) / H;
      for (int i = 0; i < H; i += W) {
        V value = load(row + i), gradient = load(g + i);
        store(dx + n * H + i, r * (gradient * load(weight + i) - value * share));
        store(mine + i, load(mine + i) + gradient * value * r);
      }
    }
  }
}

// Rounded to T: torch rounds the output of each of its kernels, and so do these.
template <typename T>
static inline V as(V v) {
  T held[W];
  store(held, v);
  return load(held);
}

// silu(gate) * up
template <typename T>
static void gated(const T *gate, const T *up, int64_t n, T *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i += W) {
    V g = load_some(gate + i, n - i);
    store_some(out + i, as<T>(g / (1.0f + exp_of(-g))) * load_some(up + i, n - i), n - i);
  }
}

template <typename T>
static void gated_gradient(const T *gate, const T *up, const T *grad, int64_t n, T *d_gate, T *d_up, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i += W) {
    V g = load_some(gate + i, n - i), gradient = load_some(grad + i, n - i);
    V share = 1.0f / (1.0f + exp_of(-g));
    V from_product = as<T>(gradient * load_some(up + i, n - i));
    store_some(d_up + i, gradient * as<T>(g * share), n - i);
    store_some(d_gate + i, from_product * share * (1.0f + g * (1.0f - share)), n - i);
  }
}

extern "C" {

int32_t vector_floats() { return W; }

void norm_float32(const float *x, const float *weight, float eps, int64_t N, int32_t H, float *out, int32_t threads) {
  norm(x, weight, eps, N, H, out, threads);
}

void norm_gradient_float32(const float *x, const float *weight, const float *grad, float eps, int64_t N, int32_t H,
                           float *dx, float *dw, int32_t threads) {
  norm_gradient(x, weight, grad, eps, N, H, dx, dw, threads);
}

void gated_float32(const float *gate, const float *up, int64_t n, float *out, int32_t threads) {
  gated(gate, up, n, out, threads);
}

void gated_bfloat16(const bfloat16 *gate, const bfloat16 *up, int64_t n, bfloat16 *out, int32_t threads) {
  gated(gate, up, n, out, threads);
}

void gated_gradient_float32(const float *gate, const float *up, const float *grad, int64_t n, float *d_gate,
                            float *d_up, int32_t threads) {
  gated_gradient(gate, up, grad, n, d_gate, d_up, threads);
}

void gated_gradient_bfloat16(const bfloat16 *gate, const bfloat16 *up, const bfloat16 *grad, int64_t n,
                             bfloat16 *d_gate, bfloat16 *d_up, int32_t threads) {
  gated_gradient(gate, up, grad, n, d_gate, d_up, threads);
}

}  // extern "C"
