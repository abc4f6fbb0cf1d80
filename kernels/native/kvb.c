/* kvbaton's CPU kernels behind one plain C interface: see kvb.h. Compiled once a machine, for that machine's vectors. */
#include "kvb.h"

#define DTYPE 0
#include "typed.h"
#undef DTYPE
#define DTYPE 1
#include "typed.h"
#undef DTYPE
#define DTYPE 2
#include "typed.h"
#undef DTYPE

#define TYPED(dtype, call)                                                                                             \
    switch (dtype) {                                                                                                   \
    case KVB_F32: call(f32); break;                                                                                    \
    case KVB_F16: call(f16); break;                                                                                    \
    default: call(bf16);                                                                                               \
    }

const char *kvb_describe(void) {
#if defined(AMX)
    if (amx_state == AMX_ON) return "16 lanes, bfloat16 products in AMX tiles";
    if (amx_state == AMX_OFF) return "16 lanes, bfloat16 products; AMX is off (KVBATON_AMX=0)";
    return "16 lanes, bfloat16 products; the system declined AMX";
#elif defined(BF16_DOT)
    return "16 lanes, bfloat16 products";
#elif LANES == 16
    return "16 lanes";
#elif LANES == 8
    return "8 lanes";
#else
    return "4 lanes";
#endif
}

int64_t kvb_packed_bytes(int64_t dtype, int64_t out, int64_t in) {
    int64_t panels = (out + PANEL - 1) / PANEL;
    if (dtype == KVB_F32) return panels * panel_size_f32(in) * 4;
    return panels * (dtype == KVB_F16 ? panel_size_f16(in) : panel_size_bf16(in)) * 2;
}

void kvb_pack(int64_t dtype, const void *weight, void *packed, int64_t out, int64_t in, int64_t interleave) {
#define CALL(T) pack_##T(weight, packed, out, in, (int)interleave)
    TYPED(dtype, CALL)
#undef CALL
}

int64_t kvb_packed_int8_bytes(int64_t dtype, int64_t out, int64_t in) {
    int64_t panels = (out + PANEL - 1) / PANEL;
    return panels * (dtype == KVB_BF16 ? int8_size_bf16(in) : int8_size_f32(in));
}

void kvb_pack_int8(int64_t dtype, const void *weight, void *packed, int64_t out, int64_t in, int64_t interleave) {
#define CALL(T) int8_pack_##T(weight, packed, out, in, (int)interleave)
    TYPED(dtype, CALL)
#undef CALL
}

int64_t kvb_workspace_bytes(const kvb_model *m, const kvb_batch *b, int64_t threads) {
    int64_t bytes = 0;
#define CALL(T) bytes = workspace_##T(m, b, threads)
    TYPED(m->dtype, CALL)
#undef CALL
    return bytes;
}

typedef struct {
    const kvb_model *model;
    const kvb_batch *batch;
    const int64_t *ids;
    void *hidden, *work;
} forward_args;

static void forward_work(member *me, const void *arg) {
    const forward_args *a = arg;
#define CALL(T) forward_##T(me, a->model, a->batch, a->ids, a->hidden, a->work)
    TYPED(a->model->dtype, CALL)
#undef CALL
}

void kvb_forward(team *t, const kvb_model *m, const kvb_batch *b, const int64_t *token_ids, void *hidden, void *work) {
    forward_args args = {m, b, token_ids, hidden, work};
    team_run(t, forward_work, &args);
}

typedef struct {
    int64_t dtype;
    const void *x;
    const kvb_matrix *matrix;
    void *y, *work;
    int64_t rows, in, out;
    int to;
} linear_args;

static void linear_work(member *me, const void *arg) {
    const linear_args *a = arg;
#define CALL(T) linear_##T(me, a->x, a->matrix, a->y, a->rows, a->in, a->out, a->to, a->work)
    TYPED(a->dtype, CALL)
#undef CALL
}

void kvb_linear(team *t, int64_t dtype, const void *x, const void *packed, const float *bias, void *y, int64_t rows,
                int64_t in, int64_t out, void *work) {
    kvb_linear_int8(t, dtype, x, packed, NULL, bias, y, rows, in, out, work);
}

void kvb_linear_int8(team *t, int64_t dtype, const void *x, const void *packed, const float *scale, const float *bias, void *y,
                     int64_t rows, int64_t in, int64_t out, void *work) {
    kvb_matrix matrix = {packed, scale, bias};
    linear_args args = {dtype, x, &matrix, y, work, rows, in, out, TO_STORE};
    team_run(t, linear_work, &args);
}

void kvb_logits(team *t, const kvb_model *m, const void *hidden, int64_t rows, float *logits, void *work) {
    kvb_matrix matrix = {m->lm_head, m->lm_head_scale, NULL};
    linear_args args = {m->dtype, hidden, &matrix, logits, work, rows, m->hidden, m->vocab, TO_FLOAT};
    team_run(t, linear_work, &args);
}

int64_t kvb_attention_bytes(const kvb_heads *h, const kvb_batch *b, int64_t threads) {
    int64_t bytes = 0;
#define CALL(T) bytes = attend_alone_bytes_##T(h, b, threads)
    TYPED(h->dtype, CALL)
#undef CALL
    return bytes;
}

typedef struct {
    const kvb_heads *heads;
    const kvb_batch *batch;
    const void *q;
    void *out, *work;
} attention_args;

static void attention_work(member *me, const void *arg) {
    const attention_args *a = arg;
#define CALL(T) attend_alone_##T(me, a->heads, a->batch, a->q, a->out, a->work)
    TYPED(a->heads->dtype, CALL)
#undef CALL
}

void kvb_attention(team *t, const kvb_heads *h, const kvb_batch *b, const void *q, void *out, void *work) {
    attention_args args = {h, b, q, out, work};
    team_run(t, attention_work, &args);
}

static int64_t argmax_row(const float *x, int64_t n) {
    vf top[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    vi odd = {0};
    int64_t whole = n / (4 * LANES) * (4 * LANES), at = 0;
    for (int64_t i = 0; i < whole; i += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j++) {
            vf v = vload(x + i + j * LANES);
            odd |= v != v;
            top[j] = vmax(top[j], v);
        }
    float best = max_lanes(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    int nan = 0;
    for (int j = 0; j < LANES; j++) nan |= odd[j] != 0;
    for (int64_t i = whole; i < n; i++) {
        best = x[i] > best ? x[i] : best;
        nan |= x[i] != x[i];
    }
    while (at < n - 1 && !(nan ? x[at] != x[at] : x[at] == best)) at++;
    return at;
}

void kvb_argmax(const float *logits, int64_t rows, int64_t vocab, int64_t *best) {
    for (int64_t i = 0; i < rows; i++) best[i] = argmax_row(logits + i * vocab, vocab);
}
