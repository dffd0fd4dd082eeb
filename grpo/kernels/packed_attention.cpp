// Causal attention over a packed row in which completions share their prompt, forward and backward. T is the type of
// what comes and goes, float or bfloat16; everything between is float32.
//
// A task is a segment (a prompt, or a completion with its prompt before it) and a kv head with all of its query heads.
// Its keys stand in columns: the prompt's, up to a whole panel; then the segment's own. All products are by one tile of
// ROWS x PANEL sums. A thread takes neighbouring tasks, so that it lays out a prompt once for several completions. Each
// thread sums its share of the prompts' gradients, and these sums are added in order: with the same number of threads,
// the result is the same to the bit. Compiled by native.py; packed_attention.py mirrors the structure.

#include "vectors.h"

constexpr int BLOCK = 48;  // rows whose scores are there at a time

template <typename P>
struct Array {  // (tokens, heads, D)
  P *at;
  int64_t token, head;
  P *of(int64_t n, int h) const { return at + n * token + h * head; }
};

struct AnyArray {
  void *at;
  int64_t token, head;
  template <typename T>
  Array<T> as() const {
    return {static_cast<T *>(at), token, head};
  }
};

struct Problem {
  int32_t kv_heads, queries, D, tasks, prompt_tokens;  // query heads of a kv head; tasks are segments
  float scale;
  int64_t N, keys;                                         // tokens; columns of the longest task
  const int64_t *start, *length, *prompt, *prompt_length;  // of each segment in order; before a prompt stand 0 tokens
  AnyArray q, k, v, out, grad, dq, dk, dv;
  float *lse;      // (heads, N)
  float *work;     // (threads, work_floats)
  float *partial;  // (threads, 2, prompt tokens, kv heads, D) of zeros
};

static inline int whole(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

// y (M, PANEL) = or += x (M,n) w (n,PANEL). ``row``, ``column``, ``w_row`` and ``y_row`` are strides.
template <int M>
static void tile(const float *x, int64_t row, int64_t column, const float *w, int64_t w_row, int n, float *y,
                 int64_t y_row, bool add) {
  V sums[M][2];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) sums[m][j] = add ? load(y + m * y_row + j * W) : V{};
  for (int k = 0; k < n; k++) {
    const V w0 = load(w + k * w_row), w1 = load(w + k * w_row + W);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const float value = x[m * row + k * column];
      sums[m][0] += value * w0;
      sums[m][1] += value * w1;
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2; j++) store(y + m * y_row + j * W, sums[m][j]);
}

template <int M>
static void tile_of(int rows, const float *x, int64_t row, int64_t column, const float *w, int64_t w_row, int n,
                    float *y, int64_t y_row, bool add) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<M - 1>(rows, x, row, column, w, w_row, n, y, y_row, add);
  }
  tile<M>(x, row, column, w, w_row, n, y, y_row, add);
}

// y (M,N) = or += x (M,n) w (n,N) for whole panels, which are ``w_panel`` apart in w.
static void product(int M, int N, int n, const float *x, int64_t row, int64_t column, const float *w, int64_t w_panel,
                    int64_t w_row, float *y, int64_t y_row, bool add) {
  const int blocks = (M + ROWS - 1) / ROWS;
  for (int j = 0; j < N / PANEL; j++)
    for (int64_t b = 0; b < blocks; b++) {
      const int first = M * b / blocks, end = M * (b + 1) / blocks;
      tile_of<ROWS>(end - first, x + first * row, row, column, w + j * w_panel, w_row, n, y + first * y_row + j * PANEL,
                    y_row, add);
    }
}

// n rows of one head as floats (n,D), and behind them zeros up to a whole panel.
template <typename T>
static void rows_of(const Array<T> &from, int64_t start, int head, int n, int D, float scale, float *to) {
  for (int t = 0; t < n; t++)
    for (int i = 0; i < D; i += W) store(to + t * D + i, load(from.of(start + t, head) + i) * scale);
  memset(to + n * D, 0, sizeof(float) * (whole(n) - n) * D);
}

// The same rows as columns: panels of (D,PANEL).
static void columns_of(const float *rows, int n, int D, float *to) {
  for (int t = 0; t < whole(n); t++)
    for (int d = 0; d < D; d++) to[(t / PANEL * D + d) * PANEL + t % PANEL] = rows[t * D + d];
}

struct Work {
  float *k, *v, *k_columns, *v_columns, *dk, *dv;  // (keys, D)
  float *q, *grad, *out;                           // (BLOCK, D)
  float *scores, *d_scores;                        // (BLOCK, keys)

  static int64_t floats(int64_t keys, int D) { return (6 * keys + 3 * BLOCK) * D + 2 * BLOCK * keys; }

  Work(float *at, int64_t keys, int D) {
    float **large[] = {&k, &v, &k_columns, &v_columns, &dk, &dv}, **small[] = {&q, &grad, &out};
    for (float **p : large) *p = at, at += keys * D;
    for (float **p : small) *p = at, at += BLOCK * D;
    scores = at, d_scores = at + BLOCK * keys;
  }
};

// A task's place: its keys are columns 0..P of the prompt, and ``own``.. of the segment.
struct Task {
  int segment, kv, P, own, T;
  int64_t start, prompt, keys;
};

static Task task_of(const Problem &p, int i) {
  Task t;
  t.segment = i % p.tasks, t.kv = i / p.tasks;
  t.start = p.start[t.segment], t.T = p.length[t.segment];
  t.prompt = p.prompt[t.segment], t.P = p.prompt_length[t.segment];
  t.own = whole(t.P), t.keys = t.own + whole(t.T);
  return t;
}

// Where the tasks of a thread begin. All threads have about equal work.
static int first_of(const Problem &p, int thread, int threads) {
  const int n = p.tasks * p.kv_heads;
  double total = 0, until = 0;
  auto cost = [&](int i) {
    const int64_t length = p.length[i % p.tasks];
    return (p.prompt_length[i % p.tasks] + length / 2 + PANEL) * double(length);
  };
  for (int i = 0; i < n; i++) total += cost(i);
  for (int i = 0; i < n; i++) {
    if (until + cost(i) / 2 >= total * thread / threads) return i;
    until += cost(i);
  }
  return n;
}

// Keys and values of a task, in rows and columns. With ``has_prompt``, the task before has laid out its prompt.
template <typename T>
static void lay_out(const Problem &p, const Task &t, bool has_prompt, bool backward, const Work &w) {
  const int D = p.D;
  auto part = [&](int64_t start, int n, int at) {
    rows_of(p.k.as<T>(), start, t.kv, n, D, 1.0f, w.k + at * D);
    rows_of(p.v.as<T>(), start, t.kv, n, D, 1.0f, w.v + at * D);
    columns_of(w.k + at * D, n, D, w.k_columns + at * D);
    if (backward) columns_of(w.v + at * D, n, D, w.v_columns + at * D);
  };
  if (t.P && !has_prompt) part(t.prompt, t.P, 0);
  part(t.start, t.T, t.own);
}

constexpr float UNSEEN = -1e30f;

// Scores of a segment's row ``r`` with keys that it does not see: behind its prompt's, and behind itself.
static void hide(const Task &t, int r, int columns, float *scores) {
  for (int i = t.P; i < t.own; i++) scores[i] = UNSEEN;
  for (int i = t.own + r + 1; i < columns; i++) scores[i] = UNSEEN;
}

// exp(score - by), and 0 for hidden scores. NaN stays NaN.
static inline V share_of(V score, float by) {
  V e = exp_of(score - by);
  return score == UNSEEN ? V{} : e;
}

struct Block {
  int rows, head, end, columns;  // columns that its last row sees, and as whole panels
};

// Scores of a block of a query head's rows, nothing hidden yet; ``w.q`` has the scaled queries.
template <typename T>
static Block scores_of(const Problem &p, const Task &t, int g, int r0, const Work &w) {
  const int R = t.T - r0 < BLOCK ? t.T - r0 : BLOCK, head = t.kv * p.queries + g, columns = t.own + whole(r0 + R);
  rows_of(p.q.as<T>(), t.start + r0, head, R, p.D, p.scale, w.q);
  product(R, columns, p.D, w.q, p.D, 1, w.k_columns, p.D * PANEL, PANEL, w.scores, t.keys, false);
  return {R, head, t.own + r0 + R, columns};
}

template <typename T>
static void forward(const Problem &p, const Task &t, const Work &w) {
  const int D = p.D;
  for (int g = 0; g < p.queries; g++)
    for (int r0 = 0; r0 < t.T; r0 += BLOCK) {
      const auto [R, head, end, columns] = scores_of<T>(p, t, g, r0, w);
      for (int r = 0; r < R; r++) {
        float *scores = w.scores + r * t.keys;
        hide(t, r0 + r, columns, scores);
        const float largest = largest_of(scores, columns);
        V total{};
        for (int i = 0; i < columns; i += W) {
          V e = share_of(load(scores + i), largest);
          store(scores + i, e);
          total += e;
        }
        const float sum = sum_of(total);
        p.lse[head * p.N + t.start + r0 + r] = largest + __builtin_logf(sum);
        for (int i = 0; i < columns; i += W) store(scores + i, load(scores + i) * (1.0f / sum));
      }
      product(R, D, end, w.scores, t.keys, 1, w.v, PANEL, D, w.out, D, false);
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i += W) store(p.out.as<T>().of(t.start + r0 + r, head) + i, load(w.out + r * D + i));
    }
}

// P = exp(S - lse), dS = P (dP - sum(dO O)), dQ = dS K, dK = dS' Q, dV = P' dO
template <typename T>
static void backward(const Problem &p, const Task &t, const Work &w) {
  const int D = p.D;
  for (int g = 0; g < p.queries; g++)
    for (int r0 = 0; r0 < t.T; r0 += BLOCK) {
      const auto [R, head, end, columns] = scores_of<T>(p, t, g, r0, w);
      rows_of(p.grad.as<T>(), t.start + r0, head, R, D, 1.0f, w.grad);
      product(R, columns, D, w.grad, D, 1, w.v_columns, D * PANEL, PANEL, w.d_scores, t.keys, false);
      for (int r = 0; r < R; r++) {
        float *scores = w.scores + r * t.keys, *d_scores = w.d_scores + r * t.keys;
        const T *out = p.out.as<T>().of(t.start + r0 + r, head);
        V both{};
        for (int i = 0; i < D; i += W) both += load(out + i) * load(w.grad + r * D + i);
        const float sum = sum_of(both), lse = p.lse[head * p.N + t.start + r0 + r];
        hide(t, r0 + r, columns, scores);
        for (int i = 0; i < columns; i += W) {
          V share = share_of(load(scores + i), lse);
          store(scores + i, share);
          store(d_scores + i, share * (load(d_scores + i) - sum));
        }
      }
      product(R, D, end, w.d_scores, t.keys, 1, w.k, PANEL, D, w.out, D, false);
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i += W)
          store(p.dq.as<T>().of(t.start + r0 + r, head) + i, load(w.out + r * D + i) * p.scale);
      product(end, D, R, w.d_scores, 1, t.keys, w.q, PANEL, D, w.dk, D, true);
      product(end, D, R, w.scores, 1, t.keys, w.grad, PANEL, D, w.dv, D, true);
    }
}

// Adds a thread's gradients of n tokens of a prompt to its own sums.
static void add_partial(const Problem &p, int thread, int64_t start, int n, int kv, const float *dk, const float *dv) {
  const int64_t size = static_cast<int64_t>(p.prompt_tokens) * p.kv_heads * p.D;
  for (int which = 0; which < 2; which++) {
    float *to = p.partial + (thread * 2 + which) * size;
    const float *from = which ? dv : dk;
    for (int t = 0; t < n; t++)
      for (int i = 0; i < p.D; i += W) {
        float *at = to + ((start + t) * p.kv_heads + kv) * p.D + i;
        store(at, load(at) + load(from + t * p.D + i));
      }
  }
}

template <typename T>
static void run(const Problem &p, bool backwards, int thread, int threads) {
  const int last = first_of(p, thread + 1, threads), D = p.D;
  Task before{-1, -1, 0, 0, 0, 0, -1, 0};
  for (int i = first_of(p, thread, threads); i < last; i++) {
    const Task t = task_of(p, i);
    const Work w(p.work + thread * Work::floats(p.keys, D), p.keys, D);
    const bool has_prompt = t.P && before.P && before.prompt == t.prompt && before.kv == t.kv;
    if (backwards && before.P && !has_prompt) add_partial(p, thread, before.prompt, before.P, before.kv, w.dk, w.dv);
    lay_out<T>(p, t, has_prompt, backwards, w);
    if (!backwards) {
      forward<T>(p, t, w);
    } else {
      const int fresh = has_prompt ? t.own : 0;
      memset(w.dk + fresh * D, 0, sizeof(float) * (t.keys - fresh) * D);
      memset(w.dv + fresh * D, 0, sizeof(float) * (t.keys - fresh) * D);
      backward<T>(p, t, w);
      const float *dk = w.dk + t.own * D, *dv = w.dv + t.own * D;
      if (!t.P && t.start < p.prompt_tokens) {
        add_partial(p, thread, t.start, t.T, t.kv, dk, dv);
      } else {
        for (int r = 0; r < t.T; r++)
          for (int d = 0; d < D; d += W) {
            store(p.dk.as<T>().of(t.start + r, t.kv) + d, load(dk + r * D + d));
            store(p.dv.as<T>().of(t.start + r, t.kv) + d, load(dv + r * D + d));
          }
      }
      if (i + 1 == last && t.P) add_partial(p, thread, t.prompt, t.P, t.kv, w.dk, w.dv);
    }
    before = t;
  }
}

template <typename T>
static void attention(const Problem &p, bool backwards, int wanted) {
#pragma omp parallel num_threads(wanted)
  {
    const int threads = omp_get_num_threads();  // there may be fewer
    run<T>(p, backwards, omp_get_thread_num(), threads);
    if (backwards) {
      const int64_t size = static_cast<int64_t>(p.prompt_tokens) * p.kv_heads * p.D;
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.prompt_tokens; n++)
        for (int kv = 0; kv < p.kv_heads; kv++)
          for (int d = 0; d < p.D; d += W) {
            V sums[2] = {};
            for (int thread = 0; thread < threads; thread++)
              for (int which = 0; which < 2; which++)
                sums[which] += load(p.partial + (thread * 2 + which) * size + (n * p.kv_heads + kv) * p.D + d);
            store(p.dk.as<T>().of(n, kv) + d, sums[0]);
            store(p.dv.as<T>().of(n, kv) + d, sums[1]);
          }
    }
  }
}

extern "C" {

int32_t panel() { return PANEL; }

int64_t work_floats(int64_t keys, int32_t D) { return Work::floats(keys, D); }

void attend(const Problem *p, int32_t in_bfloat16, int32_t backwards, int32_t threads) {
  in_bfloat16 ? attention<bfloat16>(*p, backwards, threads) : attention<float>(*p, backwards, threads);
}

}  // extern "C"
