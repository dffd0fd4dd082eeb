// One decoding step of a Llama-shaped decoder on a CPU: norm, q/k/v, rotary embedding, attention, output projection and
// gated MLP, layer after layer in one call. Each sequence is one row of the matrices. It attends to its prompt, which
// sequences share, and to its own tokens. T is the type of weights, of keys and values, and of what weights multiply:
// float or bfloat16. Sums, the residual stream, scores and logits are float32, as they are in the trainer's forward
// pass under autocast.
//
// A row does not depend on the rows beside it, to the bit: every sum adds its elements in one order, whatever the
// batch. Compiled at first use by step_compiled.py, whose ctypes structures mirror those below. It needs no header of
// torch or Python, and uses torch's own OpenMP threads.

#include "../../kernels/vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int SLICE = 12288;  // bytes of a panel that all rows are multiplied by before the next are

struct Layer {
  const float *input_norm;
  const void *qkv;  // a weight: panels of T
  const float *qkv_bias, *q_norm, *k_norm;
  const void *o;
  const float *post_norm;
  const void *gate_up, *down;
  void *prompt_keys, *prompt_values, *sequence_keys, *sequence_values;  // (slots, kv heads, tokens, D) of T
};

struct Model {
  int32_t layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary;
  float eps, scale;
  const Layer *layer;
  const float *norm;
  const void *head;
};

struct Step {
  int32_t sequences, prompt_tokens, sequence_tokens;  // running ones; tokens that a slot of the buffers holds
  const int64_t *order, *written;           // rows sorted by prompt; tokens that each row holds
  const int64_t *place;                     // of each row: where in the buffers it is
  const int64_t *prompt, *prompt_length;    // of each row: its prompt's slot, and how much of it to attend to
  const float *cos, *sin;                   // (rows, D)
  float *x, *qkv, *scores, *sums, *logits;  // (rows, columns); of scores, sums and h every thread has its own part
  void *h, *attended, *mlp;                 // the same, of T
};

template <typename T>
static void rms_norm(const float *x, const float *weight, float eps, int n, T *out) {
  V squares{};
  for (int i = 0; i < n; i += W) squares += load(x + i) * load(x + i);
  float rstd = 1.0f / __builtin_sqrtf(sum_of(squares) / n + eps);
  for (int i = 0; i < n; i += W) store(out + i, load(x + i) * rstd * load(weight + i));
}

// sums += w x for W columns at one k, or at two that stand side by side.
static inline void multiply(V &sums, const float *w, const float *x) { sums += load(w) * x[0]; }

static inline void multiply(V &sums, const bfloat16 *w, const bfloat16 *x) {
#ifdef __AVX512BF16__
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  sums = (V)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
#else
  Bits pairs;
  memcpy(&pairs, w, sizeof pairs);
  sums += from_bits(pairs << 16) * from_bits(Bits{} + (uint32_t(x[0].bits) << 16));
  sums += from_bits(pairs & 0xffff0000u) * from_bits(Bits{} + (uint32_t(x[1].bits) << 16));
#endif
}

// M rows of x (M,K) by a slice of ``n`` of a panel's k, which start at x and panel; added to ``sums`` (M,PANEL).
// Meanwhile ``fetch`` floats of ``next`` come into the cache for every line of a vector.
template <int M, typename T>
static void add_slice(const T *x, int K, const T *panel, int n, const float *next, int fetch, float *sums) {
  constexpr int ks = 4 / sizeof(T);
  V held[M][2];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) held[m][j] = load(sums + m * PANEL + j * W);
  for (int k = 0; k < n; k += ks) {
    __builtin_prefetch(next, 0, 3);
    __builtin_prefetch(next + fetch / 2, 0, 3);
    next += fetch;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      multiply(held[m][0], panel + k * PANEL, x + m * K + k);
      multiply(held[m][1], panel + k * PANEL + W * ks, x + m * K + k);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) store(sums + m * PANEL + j * W, held[m][j]);
}

template <int M, typename T>
static void add_slice_of(int rows, const T *x, int K, const T *panel, int n, const float *next, int fetch,
                         float *sums) {
  if constexpr (M > 1) {
    if (rows < M) return add_slice_of<M - 1>(rows, x, K, panel, n, next, fetch, sums);
  }
  add_slice<M>(x, K, panel, n, next, fetch, sums);
}

enum class Into { fresh, sum, gated };  // y = x W, y += x W, y = silu(x W_gate) * (x W_up)

template <typename Y>
static void put(const float *sums, Into into, Y *y, int columns) {
  V a = load(sums), b = load(sums + W);
  Y held[PANEL] = {};
  if (into == Into::gated) {
    a = a / (1.0f + exp_of(-a)) * b;
  } else if (into == Into::sum) {
    memcpy(held, y, columns * sizeof(Y));
    a += load(held);
    b += load(held + W);
  }
  store(held, a);
  store(held + W, b);
  memcpy(y, held, columns * sizeof(Y));
}

// y (B,N) of x (B,K) and weights packed by panels; with ``gated``, N gate columns and as many of up, W each in turn.
// A slice of a panel stays in the first cache while all rows are multiplied by it, and they fetch the next one.
template <typename T, typename Y>
static void product(const T *x, int B, int K, const void *weight, const float *bias, int N, Into into, Y *y,
                    float *sums) {
  const int width = into == Into::gated ? W : PANEL, panels = (N + width - 1) / width;
  const int blocks = (B + ROWS - 1) / ROWS, slice = SLICE / sizeof(T) / PANEL;
  const int fetch = (PANEL + blocks - 1) / blocks;  // floats for each line: over all blocks, a slice
#pragma omp for schedule(static)
  for (int p = 0; p < panels; p++) {
    const T *panel = static_cast<const T *>(weight) + static_cast<int64_t>(p) * K * PANEL;
    for (int b = 0; b < B; b++)
      for (int j = 0; j < PANEL; j += W) store(sums + b * PANEL + j, bias ? load(bias + p * PANEL + j) : V{});
    for (int k = 0; k < K; k += slice) {
      const int n = K - k < slice ? K - k : slice;
      const T *here = panel + static_cast<int64_t>(k) * PANEL;
      const float *next = reinterpret_cast<const float *>(here + n * PANEL);
      for (int64_t block = 0; block < blocks; block++) {
        const int first = B * block / blocks, end = B * (block + 1) / blocks;
        add_slice_of<ROWS>(end - first, x + static_cast<int64_t>(first) * K + k, K, here, n,
                           next + block * fetch * n * sizeof(T) / 4, fetch, sums + first * PANEL);
      }
    }
    const int columns = N - p * width < width ? N - p * width : width;
    for (int b = 0; b < B; b++) put(sums + b * PANEL, into, y + static_cast<int64_t>(b) * N + p * width, columns);
  }
}

static void rotate(float *x, const float *cos, const float *sin, int D) {
  const int half = D / 2;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// Scores (Q, tokens) of Q queries with keys (tokens, D); what stands behind them, up to a whole vector, is of no use.
template <int D, typename T>
static void score(const float *q, int Q, const T *keys, int tokens, float scale, float *scores, int stride) {
  for (int t = 0; t < tokens; t += W)
    for (int g = 0; g < Q; g++) {
      V dots[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) {
        const T *key = keys + static_cast<int64_t>(t + j < tokens ? t + j : tokens - 1) * D;
        dots[j] = load(q + g * D) * load(key);
#pragma GCC unroll 16
        for (int i = W; i < D; i += W) dots[j] += load(q + g * D + i) * load(key + i);
      }
      store(scores + g * stride + t, sums_of(dots) * scale);
    }
}

// Softmax in place; returns 1 / its sum, which the caller multiplies by. The row is padded to whole vectors.
static float exponentials(float *scores, int n) {
  for (int i = n; i % W; i++) scores[i] = -1e30f;
  const float largest = largest_of(scores, n);
  V total{};
  for (int i = 0; i < n; i += W) {
    V e = exp_of(load(scores + i) - largest);
    store(scores + i, e);
    total += e;
  }
  return 1.0f / sum_of(total);
}

template <int D, int G, typename T>
static void weigh(const float *weights, int stride, const T *values, int tokens, V (&out)[G][D / W]) {
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 16
    for (int i = 0; i < D / W; i++) {
      V value = load(values + static_cast<int64_t>(t) * D + i * W);
#pragma GCC unroll 16
      for (int g = 0; g < G; g++) out[g][i] += weights[g * stride + t] * value;
    }
}

// Softmax of G queries' scores, and what the values of prompt and row become under it.
template <int D, int G, typename T>
static void average(float *scores, int stride, const T *prompt_values, int shared, const T *own_values, int own,
                    T *to) {
  V out[G][D / W] = {};
  float share[G];
  for (int g = 0; g < G; g++) share[g] = exponentials(scores + g * stride, shared + own);
  weigh<D, G>(scores, stride, prompt_values, shared, out);
  weigh<D, G>(scores + shared, stride, own_values, own, out);
  for (int g = 0; g < G; g++)
    for (int i = 0; i < D / W; i++) store(to + g * D + i * W, out[g][i] * share[g]);
}

static int scores_stride(const Step &s) { return (s.prompt_tokens + s.sequence_tokens + 3 * W) / W * W; }

// All query heads of a row that share kv head ``kv``; the row's own key and value are filed away first.
template <int D, typename T>
static void attend(const Model &m, const Layer &layer, const Step &s, int row, int kv, float *scores) {
  const int Q = m.heads / m.kv_heads, own = s.written[row] + 1, shared = s.prompt_length[row];
  const int stride = scores_stride(s);
  float *qkv = s.qkv + static_cast<int64_t>(row) * (m.heads + 2 * m.kv_heads) * D;
  float *q = qkv + kv * Q * D, *k = qkv + (m.heads + kv) * D, *v = k + m.kv_heads * D;
  const float *cos = s.cos + row * D, *sin = s.sin + row * D;
  if (layer.q_norm) {
    for (int g = 0; g < Q; g++) rms_norm(q + g * D, layer.q_norm, m.eps, D, q + g * D);
    rms_norm(k, layer.k_norm, m.eps, D, k);
  }
  for (int g = 0; g < Q; g++) rotate(q + g * D, cos, sin, D);
  rotate(k, cos, sin, D);
  const int64_t in_own = (s.place[row] * m.kv_heads + kv) * s.sequence_tokens * D;
  const int64_t in_prompt = (s.prompt[row] * m.kv_heads + kv) * s.prompt_tokens * D;
  T *own_keys = static_cast<T *>(layer.sequence_keys) + in_own;
  T *own_values = static_cast<T *>(layer.sequence_values) + in_own;
  for (int i = 0; i < D; i += W) {
    store(own_keys + (own - 1) * D + i, load(k + i));
    store(own_values + (own - 1) * D + i, load(v + i));
  }
  score<D>(q, Q, static_cast<const T *>(layer.prompt_keys) + in_prompt, shared, m.scale, scores, stride);
  score<D>(q, Q, own_keys, own, m.scale, scores + shared, stride);
  const T *prompt_values = static_cast<const T *>(layer.prompt_values) + in_prompt;
  T *to = static_cast<T *>(s.attended) + (static_cast<int64_t>(row) * m.heads + kv * Q) * D;
  int g = 0;
  for (; g + 3 <= Q; g += 3)  // as many as there are registers for
    average<D, 3>(scores + g * stride, stride, prompt_values, shared, own_values, own, to + g * D);
  for (; g < Q; g++) average<D, 1>(scores + g * stride, stride, prompt_values, shared, own_values, own, to + g * D);
}

template <int D, typename T>
static void step_of(const Model &m, const Step &s, int thread) {
  const int B = s.sequences, H = m.hidden, Q = m.heads / m.kv_heads;
  float *scores = s.scores + static_cast<int64_t>(thread) * Q * scores_stride(s);
  float *sums = s.sums + static_cast<int64_t>(thread) * B * PANEL;
  T *attended = static_cast<T *>(s.attended), *mlp = static_cast<T *>(s.mlp);
  T *h = static_cast<T *>(s.h) + static_cast<int64_t>(thread) * B * H;
  auto norm = [&](const float *weight) {  // of all rows by every thread, rather than wait for others
    for (int b = 0; b < B; b++) rms_norm(s.x + b * H, weight, m.eps, H, h + b * H);
  };
  for (int l = 0; l < m.layers; l++) {
    const Layer &layer = m.layer[l];
    norm(layer.input_norm);
    product(h, B, H, layer.qkv, layer.qkv_bias, (m.heads + 2 * m.kv_heads) * D, Into::fresh, s.qkv, sums);
#pragma omp for schedule(static)
    for (int i = 0; i < B * m.kv_heads; i++) attend<D, T>(m, layer, s, s.order[i % B], i / B, scores);
    product(attended, B, m.heads * D, layer.o, nullptr, H, Into::sum, s.x, sums);
    norm(layer.post_norm);
    product(h, B, H, layer.gate_up, nullptr, m.mlp, Into::gated, mlp, sums);
    product(mlp, B, m.mlp, layer.down, nullptr, H, Into::sum, s.x, sums);
  }
  norm(m.norm);
  product(h, B, H, m.head, nullptr, m.vocabulary, Into::fresh, s.logits, sums);
}

typedef void (*StepFunction)(const Model &, const Step &, int);

template <typename T>
static StepFunction step_for(int head_dim) {
  switch (head_dim) {
    case 16: return step_of<16, T>;
    case 32: return step_of<32, T>;
    case 64: return step_of<64, T>;
    case 96: return step_of<96, T>;
    case 128: return step_of<128, T>;
    default: return nullptr;
  }
}

// Weight (N,K) into panels: ``width`` of its rows become columns ``at``..``at + width`` of each.
template <typename T>
static void pack(const T *weight, int64_t N, int64_t K, int width, int at, T *packed, int threads) {
  constexpr int ks = 4 / sizeof(T), AT_ONCE = 16;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < (N + width - 1) / width; p++)
    for (int64_t k0 = 0; k0 < K; k0 += AT_ONCE)
      for (int j = 0; j < width; j++)
        for (int64_t k = k0; k < K && k < k0 + AT_ONCE; k++)
          packed[(p * K + k / ks * ks) * PANEL + (at + j) * ks + k % ks] =
              p * width + j < N ? weight[(p * width + j) * K + k] : T{};
}

extern "C" {

int32_t vector_floats() { return W; }

// ``scores`` of a step holds so many floats a thread.
int64_t scores_of_thread(const Model *m, const Step *s) {
  return static_cast<int64_t>(m->heads / m->kv_heads) * scores_stride(*s);
}

void pack_float32(const float *weight, int64_t N, int64_t K, int32_t width, int32_t at, float *packed,
                  int32_t threads) {
  pack(weight, N, K, width, at, packed, threads);
}

void pack_bfloat16(const bfloat16 *weight, int64_t N, int64_t K, int32_t width, int32_t at, bfloat16 *packed,
                   int32_t threads) {
  pack(weight, N, K, width, at, packed, threads);
}

int32_t knows_heads_of(int32_t head_dim) { return step_for<float>(head_dim) != nullptr; }

// Returns 1, having done nothing, for a head size it is not compiled for.
int32_t decode_step(const Model *m, const Step *s, int32_t in_bfloat16, int32_t threads) {
  StepFunction step = in_bfloat16 ? step_for<bfloat16>(m->head_dim) : step_for<float>(m->head_dim);
  if (!step) return 1;
#pragma omp parallel num_threads(threads)
  step(*m, *s, omp_get_thread_num());
  return 0;
}

}  // extern "C"
