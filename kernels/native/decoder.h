/* One forward pass of a dense decoder, all layers in one call. A phase ends when all of its items are done.
 *
 *   norm -> qkv -> head norms, rope, KV write -> attention -> out + residual -> norm -> gate_up, SwiGLU -> down + residual
 */

#ifndef KVB_DECODER_ONCE
#define KVB_DECODER_ONCE
#include <time.h>

/* Adds the time since the last call to a phase; KVB_PHASES only starts the clock. */
static void count_phase(member *me, const kvb_batch *b, int phase) {
    if (!b->seconds || me->id) return;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (phase < KVB_PHASES) b->seconds[phase] += now - me->clock;
    me->clock = now;
}
#endif

typedef struct {
    FN(store) * residual; /* [tokens][hidden] */
    FN(act) * normed;     /* [tokens][apart(hidden)] */
    FN(store) * qkv;      /* [tokens][q_size + 2 * kv_size] */
    FN(act) * q;          /* [tokens][q_size] */
    FN(act) * attended;   /* [tokens][apart(q_size)] */
    FN(act) * inner;      /* [tokens][apart(intermediate)] */
    char *attention;
} FN(buffers);

static int64_t FN(carve)(const kvb_model *m, int64_t tokens, char *work, FN(buffers) * w) {
    int64_t q_size = m->num_heads * m->head_dim, kv_size = m->num_kv_heads * m->head_dim, at = 0;
#define CARVE(field, count)                                                                                            \
    w->field = (void *)(work + at);                                                                                    \
    at += ((int64_t)sizeof *w->field * tokens * (count) + 127) / 64 * 64;
    CARVE(residual, m->hidden)
    CARVE(normed, FN(apart)(m->hidden))
    CARVE(qkv, q_size + 2 * kv_size)
    CARVE(q, q_size)
    CARVE(attended, FN(apart)(q_size))
    CARVE(inner, FN(apart)(m->intermediate))
#undef CARVE
    w->attention = work + at;
    return at;
}

static kvb_heads FN(heads_of)(const kvb_model *m, int64_t layer) {
    kvb_heads h = {m->dtype, m->num_heads, m->num_kv_heads, m->head_dim, m->rotary_half, layer, m->layers[layer].window, m->scale};
    return h;
}

static int64_t FN(workspace)(const kvb_model *m, const kvb_batch *b, int64_t threads) {
    FN(buffers) w;
    kvb_heads h = FN(heads_of)(m, 0);
    return FN(carve)(m, b->num_tokens, NULL, &w) + FN(attention_bytes)(&h, b, threads);
}

static void FN(embed_rows)(member *me, const kvb_model *m, const int64_t *ids, FN(store) * to, int64_t tokens) {
    share s = share_of(me, tokens, 4);
    for (int64_t from, end; share_take(&s, &from, &end);)
        for (int64_t i = from; i < end; i++) {
            if (m->embed) memcpy(to + i * m->hidden, (const FN(store) *)m->embed + ids[i] * m->hidden, (size_t)m->hidden * sizeof *to);
            else FN(packed_row)(m->lm_head, ids[i], m->hidden, to + i * m->hidden);
        }
    team_wait(me);
}

static void FN(norm_rows)(member *me, const kvb_model *m, const void *weight, const FN(store) * x, FN(act) * y,
                          int64_t tokens) {
    share s = share_of(me, tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t i = from; i < to; i++)
            FN(norm_act)(x + i * m->hidden, weight, y + i * FN(apart)(m->hidden), m->hidden, m->norm_eps);
    team_wait(me);
}

/* x [tokens][apart(in)] as act, times a packed weight; TO_SWIGLU leaves rows that are the next product's. */
static void FN(project)(member *me, const FN(act) * x, const kvb_matrix *m, void *y, int64_t tokens, int64_t in, int64_t out,
                        int to) {
    int64_t y_stride = to == TO_SWIGLU ? FN(apart)(out / 2) : out;
    FN(product) p = {x, m->panels, m->scale, m->bias, y, tokens, in, out, FN(apart)(in), y_stride, to};
    FN(multiply)(me, &p);
    team_wait(me);
}

/* The q heads of one KV head, its K and its V, of one token. */
static void FN(turn_item)(const kvb_model *m, const kvb_batch *b, FN(buffers) * w, int64_t layer, int64_t token, int64_t kv_head) {
    const kvb_layer *weights = m->layers + layer;
    int64_t dim = m->head_dim, group = m->num_heads / m->num_kv_heads, heads = m->num_heads + 2 * m->num_kv_heads;
    FN(store) *row = w->qkv + token * heads * dim;
    const float *cos = m->cos + b->positions[token] * m->rotary_half, *sin = m->sin + b->positions[token] * m->rotary_half;
    for (int64_t i = 0; i < group; i++) {
        FN(store) *q = row + (kv_head * group + i) * dim;
        if (weights->q_norm) FN(norm)(q, weights->q_norm, q, dim, m->norm_eps);
        FN(rotate)(q, cos, sin, m->rotary_half);
        FN(widen)(q, w->q + (token * m->num_heads + kv_head * group + i) * dim, dim);
    }
    FN(store) *k = row + (m->num_heads + kv_head) * dim, *v = row + (m->num_heads + m->num_kv_heads + kv_head) * dim;
    if (weights->k_norm) FN(norm)(k, weights->k_norm, k, dim, m->norm_eps);
    FN(rotate)(k, cos, sin, m->rotary_half);
    int64_t tile = b->block_size * dim, block = b->slots[token] / b->block_size, slot = b->slots[token] % b->block_size;
    FN(store) *pool = (FN(store) *)b->pool + ((block * b->pool_layers + layer) * 2 * m->num_kv_heads + kv_head) * tile + slot * dim;
    memcpy(pool, k, (size_t)dim * sizeof *k);
    memcpy(pool + m->num_kv_heads * tile, v, (size_t)dim * sizeof *v);
}

static void FN(turn)(member *me, const kvb_model *m, const kvb_batch *b, FN(buffers) * w, int64_t layer) {
    int64_t items = b->num_tokens * m->num_kv_heads;
    share s = share_of(me, items, items / (4 * me->size));
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t i = from; i < to; i++) FN(turn_item)(m, b, w, layer, i / m->num_kv_heads, i % m->num_kv_heads);
    team_wait(me);
}

static void FN(layer)(member *me, const kvb_model *m, const kvb_batch *b, FN(buffers) * w, int64_t index) {
    const kvb_layer *l = m->layers + index;
    int64_t q_size = m->num_heads * m->head_dim, kv_size = m->num_kv_heads * m->head_dim, n = b->num_tokens;
    kvb_heads h = FN(heads_of)(m, index);
    FN(norm_rows)(me, m, l->input_norm, w->residual, w->normed, n);
    count_phase(me, b, KVB_NORM);
    FN(project)(me, w->normed, &l->qkv, w->qkv, n, m->hidden, q_size + 2 * kv_size, TO_STORE);
    count_phase(me, b, KVB_QKV);
    FN(turn)(me, m, b, w, index);
    count_phase(me, b, KVB_TURN);
    FN(attend)(me, &h, b, w->q, (FN(heads_out)){w->attended, FN(apart)(q_size)}, w->attention);
    team_wait(me);
    count_phase(me, b, KVB_ATTEND);
    FN(project)(me, w->attended, &l->out, w->residual, n, q_size, m->hidden, TO_RESIDUAL);
    count_phase(me, b, KVB_OUT);
    FN(norm_rows)(me, m, l->post_norm, w->residual, w->normed, n);
    count_phase(me, b, KVB_NORM);
    FN(project)(me, w->normed, &l->gate_up, w->inner, n, m->hidden, 2 * m->intermediate, TO_SWIGLU);
    count_phase(me, b, KVB_GATE_UP);
    FN(project)(me, w->inner, &l->down, w->residual, n, m->intermediate, m->hidden, TO_RESIDUAL);
    count_phase(me, b, KVB_DOWN);
}

static void FN(forward)(member *me, const kvb_model *m, const kvb_batch *b, const int64_t *ids, FN(store) * hidden, char *work) {
    FN(buffers) w;
    FN(carve)(m, b->num_tokens, work, &w);
    count_phase(me, b, KVB_PHASES);
    FN(embed_rows)(me, m, ids, w.residual, b->num_tokens);
    count_phase(me, b, KVB_EMBED);
    for (int64_t i = 0; i < m->num_layers; i++) FN(layer)(me, m, b, &w, i);
    share s = share_of(me, b->num_tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t i = from; i < to; i++)
            FN(norm)(w.residual + i * m->hidden, m->norm, hidden + i * m->hidden, m->hidden, m->norm_eps);
    count_phase(me, b, KVB_NORM);
}

/* x [rows, in] in storage type -> y; `work` holds rows * in floats where the types differ. */
static void FN(linear)(member *me, const FN(store) * x, const kvb_matrix *m, void *y, int64_t rows, int64_t in, int64_t out,
                       int to, void *work) {
    const FN(act) *wide = (const FN(act) *)work;
    if (sizeof(FN(act)) == sizeof(FN(store))) wide = (const FN(act) *)(const void *)x;
    else {
        share s = share_of(me, rows, 4);
        for (int64_t from, end; share_take(&s, &from, &end);)
            for (int64_t i = from; i < end; i++) FN(widen)(x + i * in, (FN(act) *)work + i * in, in);
        team_wait(me);
    }
    FN(product) p = {wide, m->panels, m->scale, m->bias, y, rows, in, out, in, out, to};
    FN(multiply)(me, &p);
}
