/* Paged attention straight from the pool, softmax in float32.
 *
 * Decode (one query): an item is (sequence, part of SPAN keys, range of KV heads); the query heads of a KV head share
 * every K and V row read.
 * Prefill: an item is (sequence, KV head, block of queries). SPAN keys at a time are packed as if they were
 * weights, scores and values are products with them, and the softmax goes along ("online").
 *
 * Parts begin at multiples of SPAN of the position, so a row's result depends on its own context and on nothing else:
 * not on the batch, not on how its prompt was cut into chunks. The two add in different orders: which of them a token
 * goes through is the caller's choice and must not depend on its company either.
 */

#ifndef KVB_ATTENTION_ONCE
#define KVB_ATTENTION_ONCE
#define SPAN 512
#define SCORES (SPAN + 16) /* floats of one head's scores: they are made 16 at a time */
#define ROWS_AT_ONCE 512 /* (query, head) rows of a prefill item: the more, the fewer times a span is packed */
#ifndef ASK
#define ASK 4096 /* bytes: how far before its use a row of the pool is asked for */
#endif
#define VALUE_DIMS (4 * LANES) /* dimensions that are summed together */
#if defined(AMX)
#define TILE_Q (2 * AMX_ROWS) /* (query, head) rows whose scores exist at a time */
#else
#define TILE_Q (4 * TILE_ROWS)
#endif

/* Where one sequence's keys of one (layer, KV head) are: token t lies in block table[t / size]. */
typedef struct {
    const char *pool; /* this layer's and head's K of block 0 */
    const int32_t *table;
    int64_t block_bytes, row_bytes, values_at, size;
} pages;

INLINE const char *key_at(const pages *p, int64_t token) {
    return p->pool + p->table[token / p->size] * p->block_bytes + token % p->size * p->row_bytes;
}

/* Asks for the `bytes` that lie ASK bytes behind `row`, in the run that ends at `end` and goes on at `next`. */
INLINE void ask_ahead(const char *row, int64_t bytes, const char *end, const char *next) {
    for (int64_t at = ASK; at < ASK + bytes; at += 64) __builtin_prefetch(row + at < end ? row + at : next + (row + at - end));
}

static pages pages_of(const kvb_heads *h, const kvb_batch *b, int64_t seq, int64_t kv_head, int64_t store_bytes) {
    int64_t head_bytes = b->block_size * h->head_dim * store_bytes, layer_bytes = 2 * h->num_kv_heads * head_bytes;
    const char *pool = (const char *)b->pool + h->layer * layer_bytes + kv_head * head_bytes;
    pages p = {pool,           b->block_tables + seq * b->table_width, b->pool_layers * layer_bytes, h->head_dim * store_bytes,
               h->num_kv_heads * head_bytes, b->block_size};
    return p;
}

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

static int64_t max_parts(const kvb_batch *b) { return (b->max_context + SPAN - 1) / SPAN; }

/* Queries of a prefill item. */
static int64_t queries_at_once(const kvb_heads *h) { return max_of(16, ROWS_AT_ONCE * h->num_kv_heads / h->num_heads); }

/* Prefill items of sequence i for one KV head. */
static int64_t query_blocks(const kvb_heads *h, const kvb_batch *b, int64_t i) {
    int64_t each = queries_at_once(h);
    return (b->cu_seqlens[i + 1] - b->cu_seqlens[i] + each - 1) / each;
}
#endif

/* ---- decode ---- */

/* out[j] = q . k[j] for n <= 16 consecutive rows of dim elements; the rest of out[16] repeats the last one. */
INLINE void FN(dot16)(const FN(act) * q, const FN(store) * k, int64_t n, int64_t dim, float *out) {
    vf sums[16];
#define ROW(j) (k + (n == 16 || j < n ? j : n - 1) * dim)
    UNROLL for (int j = 0; j < 16; j++) sums[j] = (vf){0};
#if DTYPE == 2 && defined(BF16_DOT)
    int64_t whole = dim / 32 * 32;
    for (int64_t d = 0; d < whole; d += 32) {
        __m512bh part = (__m512bh)_mm512_loadu_si512(q + d);
        UNROLL for (int j = 0; j < 16; j++) sums[j] =
            (vf)_mm512_dpbf16_ps((__m512)sums[j], part, (__m512bh)_mm512_loadu_si512(ROW(j) + d));
    }
    if (whole < dim) {
        __mmask32 mask = (1u << (dim - whole)) - 1;
        __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + whole);
        UNROLL for (int j = 0; j < 16; j++) sums[j] =
            (vf)_mm512_dpbf16_ps((__m512)sums[j], part, (__m512bh)_mm512_maskz_loadu_epi16(mask, ROW(j) + whole));
    }
#else
    int64_t whole = dim / LANES * LANES;
    for (int64_t d = 0; d < whole; d += LANES) {
        vf part = FN(load_act)(q + d);
        UNROLL for (int j = 0; j < 16; j++) sums[j] += part * FN(load)(ROW(j) + d);
    }
    if (whole < dim) {
        vf part = FN(load_act_n)(q + whole, dim - whole);
        for (int j = 0; j < 16; j++) sums[j] += part * FN(load_n)(ROW(j) + whole, dim - whole);
    }
#endif
#undef ROW
    sum_lanes_16(sums, out);
}

/* A walk over the tiles of a head range: block after block, in each head after head, which is the pool's own order, so
 * what comes next can be asked for in time. */
typedef struct {
    const pages *pages;
    int64_t heads, from, to; /* KV heads, and keys */
} FN(walk);

/* Scores of keys from..to of every query head: p[head][t - from] = q[head] . k[t]. */
INLINE void FN(score)(const FN(walk) * w, int64_t group, const FN(act) * q, int64_t dim, float *p) {
    const pages *pg = w->pages;
    int64_t row_bytes = dim * (int64_t)sizeof(FN(store)), tile = pg->size * row_bytes, run = w->heads * tile;
    for (int64_t t = w->from, end; t < w->to; t = end) {
        end = min_of(w->to, (t / pg->size + 1) * pg->size);
        const char *base = key_at(pg, t), *block = base - t % pg->size * row_bytes;
        const char *next = end < w->to ? key_at(pg, end) : key_at(pg, w->from) + pg->values_at;
        for (int64_t head = 0; head < w->heads; head++)
            for (int64_t at = 0; at < end - t; at += 16) {
                const char *row = base + head * tile + at * row_bytes;
                int64_t n = min_of(16, end - t - at);
                const FN(act) *mine = q + head * group * dim;
                float *to = p + head * group * SCORES + t + at - w->from;
                ask_ahead(row, n * row_bytes, block + run, next);
                if (n == 16) for (int64_t g = 0; g < group; g++)
                    FN(dot16)(mine + g * dim, (const FN(store) *)row, 16, dim, to + g * SCORES);
                else for (int64_t g = 0; g < group; g++)
                    FN(dot16)(mine + g * dim, (const FN(store) *)row, n, dim, to + g * SCORES);
            }
    }
}

/* acc[h] += sum of p[h][j] * v[j] over n rows, for HEADS heads and `dim` a multiple of VALUE_DIMS. With bfloat16 products
 * two rows at a time, their elements side by side, and p rounded to bfloat16; `acc` then has its order, see in_order. */
#if DTYPE == 2 && defined(BF16_DOT)
#define VALUES(HEADS)                                                                                                  \
    INLINE void FN(values##HEADS)(const float *p, const FN(store) * v, int64_t n, int64_t dim, float *acc) {           \
        for (int64_t d = 0; d < dim; d += VALUE_DIMS) {                                                                \
            __m512 sums[HEADS][4];                                                                                     \
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int j = 0; j < 4; j++) sums[h][j] =                     \
                (__m512)vload(acc + h * dim + d + j * LANES);                                                          \
            for (int64_t t = 0; t < n; t += 2) {                                                                       \
                const FN(store) *one = v + t * dim + d, *two = t + 1 < n ? one + dim : one;                            \
                __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);                                      \
                __m512i c = _mm512_loadu_si512(one + 32), e = _mm512_loadu_si512(two + 32);                            \
                __m512bh rows[4] = {(__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b),      \
                                    (__m512bh)_mm512_unpacklo_epi16(c, e), (__m512bh)_mm512_unpackhi_epi16(c, e)};     \
                UNROLL for (int h = 0; h < HEADS; h++) {                                                               \
                    uint32_t pair;                                                                                     \
                    memcpy(&pair, (const uint16_t *)(p + h * SCORES) + t, 4);                                          \
                    __m512bh weights = (__m512bh)_mm512_set1_epi32((int)(t + 1 < n ? pair : pair & 0xffff));           \
                    UNROLL for (int j = 0; j < 4; j++) sums[h][j] = _mm512_dpbf16_ps(sums[h][j], weights, rows[j]);    \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int j = 0; j < 4; j++)                                  \
                vstore(acc + h * dim + d + j * LANES, (vf)sums[h][j]);                                                 \
        }                                                                                                              \
    }
#else
#define VALUES(HEADS)                                                                                                  \
    INLINE void FN(values##HEADS)(const float *p, const FN(store) * v, int64_t n, int64_t dim, float *acc) {           \
        for (int64_t d = 0; d < dim; d += 4 * LANES) {                                                                 \
            vf sums[HEADS][4];                                                                                         \
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int j = 0; j < 4; j++) sums[h][j] =                     \
                vload(acc + h * dim + d + j * LANES);                                                                  \
            for (int64_t t = 0; t < n; t++) {                                                                          \
                vf part[4];                                                                                            \
                UNROLL for (int j = 0; j < 4; j++) part[j] = FN(load)(v + t * dim + d + j * LANES);                    \
                UNROLL for (int h = 0; h < HEADS; h++) {                                                               \
                    vf weight = splat(p[h * SCORES + t]);                                                              \
                    UNROLL for (int j = 0; j < 4; j++) sums[h][j] += weight * part[j];                                 \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int j = 0; j < 4; j++)                                  \
                vstore(acc + h * dim + d + j * LANES, sums[h][j]);                                                     \
        }                                                                                                              \
    }
#endif
VALUES(1)
VALUES(2)
VALUES(3)
VALUES(4)
#undef VALUES

/* From the order of elements that pairing rows left behind to that of the dimensions, in place. */
INLINE void FN(in_order)(float *acc, int64_t dim) {
#if DTYPE == 2 && defined(BF16_DOT)
    for (int64_t d = 0; d < dim; d += 32) {
        float mixed[32];
        memcpy(mixed, acc + d, sizeof mixed);
        for (int i = 0; i < 8; i++) memcpy(acc + d + 4 * i, mixed + (i % 2) * 16 + i / 2 * 4, 16);
    }
#else
    (void)acc, (void)dim;
#endif
}

/* The same for one head and any `dim`. */
INLINE void FN(values_any)(const float *p, const FN(store) * v, int64_t n, int64_t dim, float *acc) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t d = 0; d < dim; d += LANES) {
            int64_t width = min_of(LANES, dim - d);
            float sums[LANES] = {0};
            memcpy(sums, acc + d, (size_t)width * 4);
            vstore(sums, vload(sums) + splat(p[t]) * FN(load_n)(v + t * dim + d, width));
            memcpy(acc + d, sums, (size_t)width * 4);
        }
}

INLINE void FN(values_of_head)(int64_t group, const float *scores, int64_t first, const FN(store) * v, int64_t n,
                               int64_t dim, float *acc) {
    const float *p = scores + first;
#if DTYPE == 2 && defined(BF16_DOT)
    if (dim % VALUE_DIMS == 0) p = (const float *)(const void *)((const uint16_t *)scores + first);
#endif
    for (int64_t g = 0; dim % VALUE_DIMS && g < group; g++) FN(values_any)(p + g * SCORES, v, n, dim, acc + g * dim);
    for (int64_t g = 0; dim % VALUE_DIMS == 0 && g < group; g += 4) switch (min_of(4, group - g)) {
        case 1: FN(values1)(p + g * SCORES, v, n, dim, acc + g * dim); break;
        case 2: FN(values2)(p + g * SCORES, v, n, dim, acc + g * dim); break;
        case 3: FN(values3)(p + g * SCORES, v, n, dim, acc + g * dim); break;
        default: FN(values4)(p + g * SCORES, v, n, dim, acc + g * dim);
        }
}

/* acc[head][dim] = sum of p[head][t - from] * v[t] over the keys. */
INLINE void FN(values)(const FN(walk) * w, int64_t group, const float *p, int64_t dim, float *acc) {
    const pages *pg = w->pages;
    int64_t row_bytes = dim * (int64_t)sizeof(FN(store)), tile = pg->size * row_bytes, run = w->heads * tile;
    memset(acc, 0, (size_t)(w->heads * group * dim) * 4);
    for (int64_t t = w->from, end; t < w->to; t = end) {
        end = min_of(w->to, (t / pg->size + 1) * pg->size);
        const char *base = key_at(pg, t) + pg->values_at, *block = base - t % pg->size * row_bytes;
        const char *next = end < w->to ? key_at(pg, end) + pg->values_at : block;
        for (int64_t head = 0; head < w->heads; head++) {
            const char *row = base + head * tile;
            ask_ahead(row, (end - t) * row_bytes, block + run, next);
            FN(values_of_head)(group, p + head * group * SCORES, t - w->from, (const FN(store) *)row, end - t, dim,
                               acc + head * group * dim);
        }
    }
}

/* Softmax numerators in place of the n scores of one head; its largest score and their sum. */
static void FN(numerators)(float *s, int64_t n, float scale, float *top, float *sum) {
    int64_t whole = (n + 15) / 16 * 16;
    for (int64_t i = n; i < whole; i++) s[i] = -INFINITY;
    vf best = splat(-INFINITY), total = {0};
    for (int64_t i = 0; i < whole; i += LANES) best = vmax(best, vload(s + i));
    float largest = max_lanes(best) * scale;
    for (int64_t i = 0; i < whole; i += LANES) {
        vf e = vexp(vload(s + i) * scale - largest);
        vstore(s + i, e);
        total += e;
    }
    *top = largest;
    *sum = sum_lanes(total);
}

/* n numbers as bfloat16 in the first half of their own memory. */
static void __attribute__((unused)) FN(halve)(float *p, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vstore_b16((uint16_t *)p + i, vload(p + i));
}

/* One part of a decode row: all query heads of a range of KV heads. With a constant `dim` the loops unroll. */
INLINE void FN(part_of_dim)(const FN(walk) * w, int64_t group, const FN(act) * q, int64_t dim, float scale, float *p,
                            float *acc, float *top, float *sum) {
    FN(score)(w, group, q, dim, p);
    for (int64_t h = 0; h < w->heads * group; h++)
        FN(numerators)(p + h * SCORES, w->to - w->from, scale, top + h, sum + h);
#if DTYPE == 2 && defined(BF16_DOT)
    if (dim % VALUE_DIMS == 0)
        for (int64_t h = 0; h < w->heads * group; h++) FN(halve)(p + h * SCORES, w->to - w->from);
#endif
    FN(values)(w, group, p, dim, acc);
    if (dim % VALUE_DIMS == 0)
        for (int64_t h = 0; h < w->heads * group; h++) FN(in_order)(acc + h * dim, dim);
}

static void FN(part)(const FN(walk) * w, int64_t group, const FN(act) * q, int64_t dim, float scale, float *p,
                     float *acc, float *top, float *sum) {
    if (dim == 128) FN(part_of_dim)(w, group, q, 128, scale, p, acc, top, sum);
    else if (dim == 64) FN(part_of_dim)(w, group, q, 64, scale, p, acc, top, sum);
    else FN(part_of_dim)(w, group, q, dim, scale, p, acc, top, sum);
}

/* Bytes of one decode item's scratch: scores, sums of values, tops, sums. */
static int64_t FN(decode_scratch)(const kvb_heads *h) { return h->num_heads * (SCORES + h->head_dim + 2) * 4; }

/* A part's result before it is joined with the others: top, sum, then head_dim values, for each query head. */
INLINE float *FN(part_at)(float *parts, const kvb_heads *h, const kvb_batch *b, int64_t seq, int64_t part, int64_t head) {
    return parts + ((seq * max_parts(b) + part) * h->num_heads + head) * (h->head_dim + 2);
}

INLINE void FN(put_scaled)(FN(act) * y, const float *x, float scale, int64_t dim) {
    int64_t whole = dim / LANES * LANES;
    for (int64_t d = 0; d < whole; d += LANES) FN(put_act)(y + d, vload(x + d) * scale);
    if (whole < dim) {
        float rest[LANES] = {0};
        memcpy(rest, x + whole, (size_t)(dim - whole) * 4);
        FN(put_act_n)(y + whole, vload(rest) * scale, dim - whole);
    }
}

/* Where results go: a token's [num_heads][head_dim], `stride` from one token to the next. */
typedef struct {
    FN(act) * tokens;
    int64_t stride;
} FN(heads_out);

/* Item (sequence, part, range): `ranges` cut the KV heads. */
static void FN(decode_item)(const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(heads_out) out, float *parts,
                            int64_t item, int64_t ranges, char *scratch) {
    int64_t all = max_parts(b), group = h->num_heads / h->num_kv_heads, dim = h->head_dim;
    int64_t range = item % ranges, part = item / ranges % all, seq = item / ranges / all;
    int64_t first = h->num_kv_heads * range / ranges, last = h->num_kv_heads * (range + 1) / ranges;
    int64_t context = b->context_lens[seq], seen = h->window ? max_of(0, context - h->window) : 0;
    int64_t heads = (last - first) * group, head = first * group;
    float *p = (float *)scratch, *acc = p + heads * SCORES, *top = acc + heads * dim, *sum = top + heads;
    pages pg = pages_of(h, b, seq, first, sizeof(FN(store)));
    FN(walk) w = {&pg, last - first, max_of(part * SPAN, seen), min_of((part + 1) * SPAN, context)};
    if (w.from < w.to) FN(part)(&w, group, q + (seq * h->num_heads + head) * dim, dim, (float)h->scale, p, acc, top, sum);
    for (int64_t i = 0; i < heads; i++) {
        if (all == 1) {
            FN(put_scaled)(out.tokens + seq * out.stride + (head + i) * dim, acc + i * dim, 1.0f / sum[i], dim);
            continue;
        }
        float *result = FN(part_at)(parts, h, b, seq, part, head + i);
        result[1] = 0;
        if (w.from >= w.to) continue;
        result[0] = top[i];
        result[1] = sum[i];
        memcpy(result + 2, acc + i * dim, (size_t)dim * 4);
    }
}

/* Joins the parts of one (sequence, head). */
static void FN(join_item)(const kvb_heads *h, const kvb_batch *b, FN(heads_out) out, float *parts, int64_t item) {
    int64_t seq = item / h->num_heads, head = item % h->num_heads, dim = h->head_dim, all = max_parts(b);
    float top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < all; i++) {
        float *part = FN(part_at)(parts, h, b, seq, i, head);
        if (part[1] > 0 && part[0] > top) top = part[0];
    }
    float values[dim];
    for (int64_t d = 0; d < dim; d++) values[d] = 0;
    for (int64_t i = 0; i < all; i++) {
        float *part = FN(part_at)(parts, h, b, seq, i, head);
        if (part[1] == 0) continue;
        float weight = expf(part[0] - top);
        sum += weight * part[1];
        for (int64_t d = 0; d < dim; d++) values[d] += weight * part[2 + d];
    }
    FN(put_scaled)(out.tokens + seq * out.stride + head * dim, values, 1.0f / sum, dim);
}

/* ---- prefill ---- */

typedef struct {
    FN(store) * keys;   /* packed as weights [SPAN, head_dim] */
    FN(store) * values; /* packed as weights [head_dim, SPAN] */
    FN(act) * rows;     /* [TILE_Q][head_dim] */
    FN(act) * weights;  /* [TILE_Q][SPAN] */
    float *scores;      /* [TILE_Q][SPAN], panel after panel */
    float *acc;         /* [rows][padded head_dim], panel after panel within a tile */
    float *top, *sum;   /* [rows] */
} FN(prefill_work);

static int64_t FN(prefill_carve)(const kvb_heads *h, char *scratch, FN(prefill_work) * w) {
    int64_t group = h->num_heads / h->num_kv_heads, dim = h->head_dim, wide = padded(dim), rows = queries_at_once(h) * group + TILE_Q;
    int64_t at = 0;
#define CARVE(field, count)                                                                                            \
    w->field = (void *)(scratch + at);                                                                                 \
    at += ((int64_t)sizeof *w->field * (count) + 63) / 64 * 64;
    CARVE(keys, SPAN * (dim + 1))
    CARVE(values, wide * SPAN)
    CARVE(rows, TILE_Q * dim)
    CARVE(weights, TILE_Q * SPAN)
    CARVE(scores, TILE_Q * SPAN)
    CARVE(acc, rows * wide)
    CARVE(top, rows)
    CARVE(sum, rows)
#undef CARVE
    return at;
}

/* A row of keys into column c of a panel: pairs of inputs stay together. */
INLINE void FN(pack_key)(const FN(store) * key, FN(store) * panel, int64_t c, int64_t dim) {
#if PAIRED
    for (int64_t d = 0; d < dim; d += 2) memcpy(panel + d * PANEL + c * 2, key + d, 4);
#else
    for (int64_t d = 0; d < dim; d++) panel[d * PANEL + c] = key[d];
#endif
}

/* Two rows of values (the second may be NULL: zeros) as inputs t and t + 1 of the panels of their dimensions. */
INLINE void FN(pack_values)(const FN(store) * one, const FN(store) * two, FN(store) * values, int64_t t, int64_t dim) {
    int64_t value_panel = FN(panel_size)(SPAN);
    for (int64_t base = 0; base < dim; base += PANEL) {
        FN(store) *to = values + base / PANEL * value_panel + t * PANEL;
        int64_t width = min_of(PANEL, dim - base);
#if PAIRED
        for (int64_t d = 0; d < width; d++) {
            uint32_t pair = one[base + d] | (two ? (uint32_t)two[base + d] << 16 : 0);
            memcpy(to + 2 * d, &pair, 4);
        }
        for (int64_t d = 2 * width; d < 2 * PANEL; d++) to[d] = 0;
#else
        memset(to, 0, 2 * PANEL * sizeof *to);
        memcpy(to, one + base, (size_t)width * sizeof *to);
        if (two) memcpy(to + PANEL, two + base, (size_t)width * sizeof *to);
#endif
    }
}

/* Keys from..to as panels of 32 keys; values as panels of 32 dimensions. Slots past `to` are zeros. */
static void FN(pack_span)(const pages *pg, int64_t from, int64_t to, int64_t dim, FN(prefill_work) * w) {
    int64_t n = to - from, kept = padded(n), key_panel = FN(panel_size)(dim), value_panel = FN(panel_size)(SPAN);
    if (n < kept) memset(w->keys + n / PANEL * key_panel, 0, (size_t)key_panel * sizeof *w->keys);
    for (int64_t t = 0; t < n; t++)
        FN(pack_key)((const FN(store) *)key_at(pg, from + t), w->keys + t / PANEL * key_panel, t % PANEL, dim);
    for (int64_t t = 0; t < n; t += 2) {
        const char *one = key_at(pg, from + t) + pg->values_at;
        const char *two = t + 1 < n ? key_at(pg, from + t + 1) + pg->values_at : NULL;
        FN(pack_values)((const FN(store) *)one, (const FN(store) *)two, w->values, t, dim);
    }
    for (int64_t base = 0; base < dim; base += PANEL)
        memset(w->values + base / PANEL * value_panel + (n + 1) / 2 * 2 * PANEL, 0,
               (size_t)((kept - (n + 1) / 2 * 2) * PANEL) * sizeof *w->values);
}

/* One tile of (query, head) rows against the packed span of keys from..to; row r's query has position `position[r]`. */
static void FN(tile_span)(const kvb_heads *h, FN(prefill_work) * w, int64_t rows, int64_t tile, int64_t from, int64_t to,
                          const int64_t *position) {
    int64_t dim = h->head_dim, wide = padded(dim), key_panel = FN(panel_size)(dim), value_panel = FN(panel_size)(SPAN);
    int64_t last = position[rows - 1] + 1, first = h->window ? max_of(0, position[0] + 1 - h->window) : 0;
    int64_t height = FN(tile_rows)(), low = max_of(first - from, 0) / PANEL, high = (min_of(to, last) - from + PANEL - 1) / PANEL;
    if (low >= high) return;
    float *acc = w->acc + tile * wide, *top = w->top + tile, *sum = w->sum + tile;
    for (int64_t p = low; p < high; p++)
        for (int64_t r = 0; r < rows; r += height)
            FN(tile)(min_of(height, rows - r), w->rows + r * dim, dim, w->keys + p * key_panel, dim,
                     w->scores + (p * TILE_Q + r) * PANEL, 0, (const char *)w->keys, 0);
    for (int64_t r = 0; r < rows; r++) {
        int64_t end = min_of(to, position[r] + 1) - from, start = h->window ? position[r] + 1 - h->window - from : 0;
        vf best = splat(-INFINITY), total = {0};
        for (int64_t p = low; p < high; p++) {
            float *s = w->scores + (p * TILE_Q + r) * PANEL;
            for (int64_t c = max_of(0, end - p * PANEL); c < PANEL; c++) s[c] = -INFINITY;
            for (int64_t c = 0; c < min_of(PANEL, start - p * PANEL); c++) s[c] = -INFINITY;
            for (int64_t c = 0; c < PANEL; c += LANES) best = vmax(best, vload(s + c));
        }
        float largest = max_lanes(best) * (float)h->scale;
        float *row_acc = acc + r / height * height * wide + r % height * PANEL;
        if (largest > top[r]) {
            float shrink = expf(top[r] - largest); /* 0 at first */
            top[r] = largest;
            sum[r] *= shrink;
            for (int64_t d = 0; d < wide; d += PANEL)
                for (int64_t c = 0; c < PANEL; c += LANES) {
                    float *a = row_acc + d * min_of(height, rows - r / height * height) + c;
                    vstore(a, vload(a) * shrink);
                }
        }
        float reference = top[r] == -INFINITY ? 0.0f : top[r];
        for (int64_t p = low; p < high; p++)
            for (int64_t c = 0; c < PANEL; c += LANES) {
                vf e = vexp(vload(w->scores + (p * TILE_Q + r) * PANEL + c) * (float)h->scale - reference);
                total += e;
                FN(put_act)(w->weights + r * SPAN + p * PANEL + c, e);
            }
        sum[r] += sum_lanes(total);
    }
    for (int64_t d = 0; d < wide; d += PANEL)
        for (int64_t r = 0; r < rows; r += height) {
            int64_t some = min_of(height, rows - r);
            FN(tile)(some, w->weights + r * SPAN + low * PANEL, SPAN,
                     w->values + d / PANEL * value_panel + low * PANEL * PANEL, (high - low) * PANEL,
                     acc + r * wide + d * some, 1, (const char *)w->values, 0);
        }
}

static void FN(prefill_item)(const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(heads_out) out, int64_t seq,
                             int64_t kv_head, int64_t block, char *scratch) {
    int64_t group = h->num_heads / h->num_kv_heads, dim = h->head_dim, wide = padded(dim), first = kv_head * group;
    int64_t each = queries_at_once(h), token = b->cu_seqlens[seq] + block * each;
    int64_t end = min_of(token + each, b->cu_seqlens[seq + 1]);
    int64_t context = b->context_lens[seq], at = context - (b->cu_seqlens[seq + 1] - token), rows = (end - token) * group;
    int64_t seen_from = h->window ? max_of(0, at + 1 - h->window) : 0, seen_to = at + end - token;
    FN(prefill_work) w;
    FN(prefill_carve)(h, scratch, &w);
    memset(w.acc, 0, (size_t)(rows * wide) * 4);
    for (int64_t r = 0; r < rows; r++) w.top[r] = -INFINITY, w.sum[r] = 0;
    pages pg = pages_of(h, b, seq, kv_head, sizeof(FN(store)));
    for (int64_t from = seen_from / SPAN * SPAN; from < seen_to; from += SPAN) {
        int64_t to = min_of(from + SPAN, seen_to);
        FN(pack_span)(&pg, from, to, dim, &w);
        for (int64_t tile = 0; tile < rows; tile += TILE_Q) {
            int64_t some = min_of(TILE_Q, rows - tile), position[TILE_Q];
            for (int64_t r = 0; r < some; r++) {
                int64_t query = (tile + r) / group, head = first + (tile + r) % group;
                position[r] = at + query;
                memcpy(w.rows + r * dim, q + ((token + query) * h->num_heads + head) * dim, (size_t)dim * sizeof *q);
            }
            FN(tile_span)(h, &w, some, tile, from, to, position);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t tile = r / TILE_Q * TILE_Q, in_tile = r - tile, some = min_of(TILE_Q, rows - tile);
        int64_t most = FN(tile_rows)(), base = in_tile / most * most, height = min_of(most, some - base);
        FN(act) *y = out.tokens + (token + r / group) * out.stride + (first + r % group) * dim;
        float inverse = 1.0f / w.sum[r];
        for (int64_t d = 0; d < dim; d += LANES) {
            float *a = w.acc + (tile + base) * wide + d / PANEL * PANEL * height + (in_tile - base) * PANEL + d % PANEL;
            if (dim - d >= LANES) FN(put_act)(y + d, vload(a) * inverse);
            else FN(put_act_n)(y + d, vload(a) * inverse, dim - d);
        }
    }
}

/* ---- both ---- */

static int64_t FN(item_bytes)(const kvb_heads *h) {
    FN(prefill_work) w;
    return max_of(FN(decode_scratch)(h), FN(prefill_carve)(h, NULL, &w)) / 64 * 64 + 64;
}

static int64_t FN(attention_bytes)(const kvb_heads *h, const kvb_batch *b, int64_t threads) {
    int64_t parts = max_parts(b) > 1 ? b->num_decodes * max_parts(b) * h->num_heads * (h->head_dim + 2) * 4 : 0;
    return threads * FN(item_bytes)(h) + parts + 64;
}

/* q [num_tokens, num_heads, head_dim]. The K and V of the step are in the pool. Ends with a wait where parts
 * are joined; the caller waits otherwise. */
static void FN(attend)(member *me, const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(heads_out) out, char *work) {
    int64_t ranges = 1, prefills = 0; /* cut heads only where there are too few rows to share out */
    while (ranges < h->num_kv_heads && b->num_decodes * max_parts(b) * ranges < 4 * me->size && me->size > 1) ranges++;
    int64_t decodes = b->num_decodes * max_parts(b) * ranges;
    for (int64_t i = b->num_decodes; i < b->num_seqs; i++) prefills += query_blocks(h, b, i) * h->num_kv_heads;
    char *scratch = work + me->id * FN(item_bytes)(h);
    float *parts = (float *)(work + me->size * FN(item_bytes)(h));
    share s = share_of(me, prefills, 1);
    for (int64_t from, to; share_take(&s, &from, &to);) {
        /* last block first: it has the longest context */
        int64_t seq = b->num_decodes, left = from;
        while (left >= query_blocks(h, b, seq) * h->num_kv_heads) left -= query_blocks(h, b, seq++) * h->num_kv_heads;
        int64_t block = query_blocks(h, b, seq) - 1 - left / h->num_kv_heads;
        FN(prefill_item)(h, b, q, out, seq, left % h->num_kv_heads, block, scratch);
    }
    amx_done();
    s = share_of(me, decodes, decodes / (8 * me->size));
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t item = from; item < to; item++) FN(decode_item)(h, b, q, out, parts, item, ranges, scratch);
    if (max_parts(b) > 1 && b->num_decodes) {
        team_wait(me);
        s = share_of(me, b->num_decodes * h->num_heads, 4);
        for (int64_t from, to; share_take(&s, &from, &to);)
            for (int64_t item = from; item < to; item++) FN(join_item)(h, b, out, parts, item);
    }
}

/* The same with q and out [num_tokens, num_heads, head_dim] in storage type: converted on the way where products take another type. */
static int64_t FN(attend_alone_bytes)(const kvb_heads *h, const kvb_batch *b, int64_t threads) {
    return FN(attention_bytes)(h, b, threads) + 2 * b->num_tokens * h->num_heads * h->head_dim * (int64_t)sizeof(FN(act)) + 64;
}

static void FN(attend_alone)(member *me, const kvb_heads *h, const kvb_batch *b, const FN(store) * q, FN(store) * out,
                             char *work) {
    int64_t row = h->num_heads * h->head_dim, size = b->num_tokens * row;
    if (sizeof *q == sizeof(FN(act))) {
        FN(attend)(me, h, b, (const FN(act) *)(const void *)q, (FN(heads_out)){(FN(act) *)(void *)out, row}, work);
        return;
    }
    FN(act) *wide_q = (FN(act) *)(void *)work, *wide_out = wide_q + size;
    share s = share_of(me, b->num_tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);) FN(widen)(q + from * row, wide_q + from * row, (to - from) * row);
    team_wait(me);
    FN(attend)(me, h, b, wide_q, (FN(heads_out)){wide_out, row}, work + (2 * size * (int64_t)sizeof(FN(act)) + 63) / 64 * 64);
    team_wait(me);
    s = share_of(me, b->num_tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);) FN(narrow)(wide_out + from * row, out + from * row, (to - from) * row);
}
