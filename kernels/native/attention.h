/* Paged attention straight from the pool, softmax in float32.
 *
 * Decode (one query): an item is (sequence, KV head, part of SPAN keys); its query heads share every K and V row read.
 * Prefill: an item is (sequence, KV head, block of QUERIES queries). SPAN keys at a time are packed as if they were
 * weights, scores and values are products with them, and the softmax goes along ("online").
 *
 * Parts begin at multiples of SPAN of the position, so a row's result depends on its own context and on nothing else:
 * not on the batch, not on how its prompt was cut into chunks.
 */

#ifndef KVB_ATTENTION_ONCE
#define KVB_ATTENTION_ONCE
#define SPAN 512
#define QUERIES 128
#define TILE_Q (4 * TILE_ROWS) /* (query, head) rows whose scores exist at a time */

/* Where one sequence's keys of one (layer, KV head) are: token t lies in block table[t / size]. */
typedef struct {
    const char *pool; /* this layer's and head's K of block 0 */
    const int32_t *table;
    int64_t block_bytes, row_bytes, values_at, size;
} pages;

INLINE const char *key_at(const pages *p, int64_t token) {
    return p->pool + p->table[token / p->size] * p->block_bytes + token % p->size * p->row_bytes;
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

/* Prefill items of sequence i. */
static int64_t query_blocks(const kvb_batch *b, int64_t i) {
    return (b->cu_seqlens[i + 1] - b->cu_seqlens[i] + QUERIES - 1) / QUERIES;
}
#endif

/* ---- decode ---- */

/* out[j] = q . k[j] for 16 rows of head_dim elements. */
INLINE void FN(dot16)(const FN(act) * q, const FN(store) *const *k, int64_t dim, float *out) {
    vf sums[16];
#if DTYPE == 2 && defined(BF16_DOT)
    int64_t whole = dim / 32 * 32;
    UNROLL for (int j = 0; j < 16; j++) sums[j] = (vf){0};
    for (int64_t d = 0; d < whole; d += 32) {
        __m512bh part = (__m512bh)_mm512_loadu_si512(q + d);
        UNROLL for (int j = 0; j < 16; j++) sums[j] =
            (vf)_mm512_dpbf16_ps((__m512)sums[j], part, (__m512bh)_mm512_loadu_si512(k[j] + d));
    }
    if (whole < dim) {
        __mmask32 mask = (1u << (dim - whole)) - 1;
        __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + whole);
        UNROLL for (int j = 0; j < 16; j++) sums[j] =
            (vf)_mm512_dpbf16_ps((__m512)sums[j], part, (__m512bh)_mm512_maskz_loadu_epi16(mask, k[j] + whole));
    }
#else
    int64_t whole = dim / LANES * LANES;
    UNROLL for (int j = 0; j < 16; j++) sums[j] = (vf){0};
    for (int64_t d = 0; d < whole; d += LANES) {
        vf part = FN(load_act)(q + d);
        UNROLL for (int j = 0; j < 16; j++) sums[j] += part * FN(load)(k[j] + d);
    }
    if (whole < dim) {
        vf part = FN(load_act_n)(q + whole, dim - whole);
        for (int j = 0; j < 16; j++) sums[j] += part * FN(load_n)(k[j] + whole, dim - whole);
    }
#endif
    sum_lanes_16(sums, out);
}

/* acc[h][dim] += sum over keys of p[h][key] * v[key], for HEADS heads. */
#define VALUES(HEADS)                                                                                                  \
    static void FN(values##HEADS)(const float *p, const pages *pg, int64_t from, int64_t to, int64_t dim, float *acc) { \
        for (int64_t d = 0; d < dim; d += 4 * LANES) {                                                                 \
            vf sums[HEADS][4];                                                                                         \
            int64_t n = dim - d;                                                                                       \
            for (int h = 0; h < HEADS; h++) for (int j = 0; j < 4; j++) sums[h][j] = (vf){0};                          \
            for (int64_t t = from; t < to;) {                                                                          \
                const char *row = key_at(pg, t) + pg->values_at;                                                       \
                int64_t end = min_of(to, (t / pg->size + 1) * pg->size);                                               \
                for (; t < end; t++, row += pg->row_bytes) {                                                           \
                    const FN(store) *v = (const FN(store) *)row + d;                                                   \
                    vf part[4];                                                                                        \
                    UNROLL for (int j = 0; j < 4; j++) part[j] = n >= (j + 1) * LANES ? FN(load)(v + j * LANES)        \
                        : n > j * LANES ? FN(load_n)(v + j * LANES, n - j * LANES) : (vf){0};                          \
                    UNROLL for (int h = 0; h < HEADS; h++) {                                                           \
                        vf weight = splat(p[h * SPAN + t - from]);                                                     \
                        UNROLL for (int j = 0; j < 4; j++) sums[h][j] += weight * part[j];                             \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            for (int h = 0; h < HEADS; h++) for (int j = 0; j < 4; j++)                                                \
                vstore(acc + h * (dim + 4 * LANES) + d + j * LANES, sums[h][j]);                                    \
        }                                                                                                              \
    }
VALUES(1)
VALUES(2)
VALUES(3)
VALUES(4)
#undef VALUES

static void FN(values)(int64_t heads, const float *p, const pages *pg, int64_t from, int64_t to, int64_t dim,
                       float *acc) {
    for (int64_t h = 0; h < heads; h += 4) {
        const float *at = p + h * SPAN;
        float *into = acc + h * (dim + 4 * LANES);
        switch (min_of(4, heads - h)) {
        case 1: FN(values1)(at, pg, from, to, dim, into); break;
        case 2: FN(values2)(at, pg, from, to, dim, into); break;
        case 3: FN(values3)(at, pg, from, to, dim, into); break;
        default: FN(values4)(at, pg, from, to, dim, into);
        }
    }
}

/* Scores of keys from..to, softmax numerators in their place; the largest score and the sum of each head. */
static void FN(weigh)(int64_t heads, const FN(act) * q, const pages *pg, int64_t from, int64_t to, int64_t dim,
                      double scale, float *p, float *top, float *sum) {
    for (int64_t t = from; t < to; t += 16) {
        const FN(store) *k[16];
        for (int64_t j = 0; j < 16; j++) k[j] = (const FN(store) *)key_at(pg, min_of(t + j, to - 1));
        for (int64_t h = 0; h < heads; h++) {
            float *s = p + h * SPAN + t - from;
            if (dim == 128) FN(dot16)(q + h * 128, k, 128, s);
            else if (dim == 64) FN(dot16)(q + h * 64, k, 64, s);
            else FN(dot16)(q + h * dim, k, dim, s);
        }
    }
    int64_t n = to - from, whole = (n + 15) / 16 * 16;
    for (int64_t h = 0; h < heads; h++) {
        float *s = p + h * SPAN;
        for (int64_t i = n; i < whole; i++) s[i] = -INFINITY;
        vf best = splat(-INFINITY), total = {0};
        for (int64_t i = 0; i < whole; i += LANES) best = vmax(best, vload(s + i));
        float largest = max_lanes(best) * (float)scale;
        for (int64_t i = 0; i < whole; i += LANES) {
            vf e = vexp(vload(s + i) * (float)scale - largest);
            vstore(s + i, e);
            total += e;
        }
        top[h] = largest;
        sum[h] = sum_lanes(total);
    }
}

/* Bytes of one decode item's scratch: scores, sums of values. */
static int64_t FN(decode_scratch)(const kvb_heads *h) {
    int64_t group = h->num_heads / h->num_kv_heads;
    return group * (SPAN + h->head_dim + 4 * LANES) * 4;
}

/* A part's result before it is joined with the others: top, sum, then head_dim values, for each query head. */
INLINE float *FN(part_at)(float *parts, const kvb_heads *h, const kvb_batch *b, int64_t seq, int64_t part, int64_t head) {
    return parts + ((seq * max_parts(b) + part) * h->num_heads + head) * (h->head_dim + 2);
}

static void FN(decode_item)(const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(act) * out, float *parts,
                            int64_t item, char *scratch) {
    int64_t all = max_parts(b), group = h->num_heads / h->num_kv_heads, dim = h->head_dim;
    int64_t part = item % all, kv_head = item / all % h->num_kv_heads, seq = item / all / h->num_kv_heads;
    int64_t context = b->context_lens[seq], seen = h->window ? max_of(0, context - h->window) : 0;
    int64_t from = max_of(part * SPAN, seen), to = min_of((part + 1) * SPAN, context), first = kv_head * group;
    float top[group], sum[group], *p = (float *)scratch, *acc = p + group * SPAN;
    if (from >= to) {
        if (all > 1)
            for (int64_t i = 0; i < group; i++) FN(part_at)(parts, h, b, seq, part, first + i)[1] = 0;
        return;
    }
    pages pg = pages_of(h, b, seq, kv_head, sizeof(FN(store)));
    FN(weigh)(group, q + (seq * h->num_heads + first) * dim, &pg, from, to, dim, h->scale, p, top, sum);
    FN(values)(group, p, &pg, from, to, dim, acc);
    for (int64_t i = 0; i < group; i++) {
        float *mine = acc + i * (dim + 4 * LANES);
        if (all > 1) {
            float *result = FN(part_at)(parts, h, b, seq, part, first + i);
            result[0] = top[i];
            result[1] = sum[i];
            memcpy(result + 2, mine, (size_t)dim * 4);
            continue;
        }
        FN(act) *y = out + (seq * h->num_heads + first + i) * dim;
        float inverse = 1.0f / sum[i];
        int64_t whole = dim / LANES * LANES;
        for (int64_t d = 0; d < whole; d += LANES) FN(put_act)(y + d, vload(mine + d) * inverse);
        if (whole < dim) FN(put_act_n)(y + whole, vload(mine + whole) * inverse, dim - whole);
    }
}

/* Joins the parts of one (sequence, head). */
static void FN(join_item)(const kvb_heads *h, const kvb_batch *b, FN(act) * out, float *parts, int64_t item) {
    int64_t seq = item / h->num_heads, head = item % h->num_heads, dim = h->head_dim, all = max_parts(b);
    float top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < all; i++) {
        float *part = FN(part_at)(parts, h, b, seq, i, head);
        if (part[1] > 0 && part[0] > top) top = part[0];
    }
    float values[dim + LANES];
    for (int64_t d = 0; d < dim; d++) values[d] = 0;
    for (int64_t i = 0; i < all; i++) {
        float *part = FN(part_at)(parts, h, b, seq, i, head);
        if (part[1] == 0) continue;
        float weight = expf(part[0] - top);
        sum += weight * part[1];
        for (int64_t d = 0; d < dim; d++) values[d] += weight * part[2 + d];
    }
    FN(act) *y = out + (seq * h->num_heads + head) * dim;
    for (int64_t d = 0; d < dim; d += LANES) {
        vf v = vload(values + d) * (1.0f / sum);
        if (dim - d >= LANES) FN(put_act)(y + d, v);
        else FN(put_act_n)(y + d, v, dim - d);
    }
}

/* ---- prefill ---- */

typedef struct {
    FN(store) * keys;   /* packed as weights [SPAN, head_dim] */
    FN(store) * values; /* packed as weights [head_dim, SPAN] */
    FN(act) * rows;     /* [TILE_Q][head_dim] */
    FN(act) * weights;  /* [TILE_Q][SPAN] */
    float *scores;      /* [TILE_Q][SPAN], panel after panel */
    float *acc;         /* [QUERIES * group][padded head_dim], panel after panel within a tile */
    float *top, *sum;   /* [QUERIES * group] */
} FN(prefill_work);

static int64_t FN(prefill_carve)(const kvb_heads *h, char *scratch, FN(prefill_work) * w) {
    int64_t group = h->num_heads / h->num_kv_heads, dim = h->head_dim, wide = padded(dim), rows = QUERIES * group + TILE_Q;
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

/* Keys from..to as panels of 32 keys; values as panels of 32 dimensions. Slots past `to` are zeros. */
static void FN(pack_span)(const pages *pg, int64_t from, int64_t to, int64_t dim, FN(prefill_work) * w) {
    int64_t n = to - from, kept = padded(n), key_panel = FN(panel_size)(dim), value_panel = FN(panel_size)(SPAN);
    for (int64_t t = 0; t < kept; t++) {
        FN(store) *k = w->keys + t / PANEL * key_panel;
        int64_t c = t % PANEL;
        if (t >= n) {
            for (int64_t d = 0; d < dim; d++) k[PAIRED ? (d / 2 * PANEL + c) * 2 + d % 2 : d * PANEL + c] = 0;
            for (int64_t d = 0; d < padded(dim); d++) {
                FN(store) *v = w->values + d / PANEL * value_panel;
                v[PAIRED ? (t / 2 * PANEL + d % PANEL) * 2 + t % 2 : t * PANEL + d % PANEL] = 0;
            }
            continue;
        }
        const char *row = key_at(pg, from + t);
        const FN(store) *key = (const FN(store) *)row, *value = (const FN(store) *)(row + pg->values_at);
        for (int64_t d = 0; d < dim; d++) k[PAIRED ? (d / 2 * PANEL + c) * 2 + d % 2 : d * PANEL + c] = key[d];
        for (int64_t base = 0; base < dim; base += PANEL) {
            FN(store) *v = w->values + base / PANEL * value_panel;
            int64_t width = min_of(PANEL, dim - base);
            for (int64_t d = 0; d < PANEL; d++)
                v[PAIRED ? (t / 2 * PANEL + d) * 2 + t % 2 : t * PANEL + d] = d < width ? value[base + d] : 0;
        }
    }
}

/* One tile of (query, head) rows against the packed span of keys from..to; row r's query has position `position[r]`. */
static void FN(tile_span)(const kvb_heads *h, FN(prefill_work) * w, int64_t rows, int64_t tile, int64_t from, int64_t to,
                          const int64_t *position) {
    int64_t dim = h->head_dim, wide = padded(dim), key_panel = FN(panel_size)(dim), value_panel = FN(panel_size)(SPAN);
    int64_t last = position[rows - 1] + 1, first = h->window ? max_of(0, position[0] + 1 - h->window) : 0;
    int64_t low = max_of(first - from, 0) / PANEL, high = (min_of(to, last) - from + PANEL - 1) / PANEL;
    if (low >= high) return;
    float *acc = w->acc + tile * wide, *top = w->top + tile, *sum = w->sum + tile;
    for (int64_t p = low; p < high; p++)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            FN(tile)(min_of(TILE_ROWS, rows - r), w->rows + r * dim, dim, w->keys + p * key_panel, dim,
                     w->scores + (p * TILE_Q + r) * PANEL, 0);
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
        float *row_acc = acc + r / TILE_ROWS * TILE_ROWS * wide + r % TILE_ROWS * PANEL;
        if (largest > top[r]) {
            float shrink = expf(top[r] - largest); /* 0 at first */
            top[r] = largest;
            sum[r] *= shrink;
            for (int64_t d = 0; d < wide; d += PANEL)
                for (int64_t c = 0; c < PANEL; c += LANES) {
                    float *a = row_acc + d * min_of(TILE_ROWS, rows - r / TILE_ROWS * TILE_ROWS) + c;
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
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            int64_t some = min_of(TILE_ROWS, rows - r);
            FN(tile)(some, w->weights + r * SPAN + low * PANEL, SPAN,
                     w->values + d / PANEL * value_panel + low * PANEL * PANEL, (high - low) * PANEL,
                     acc + r * wide + d * some, 1);
        }
}

static void FN(prefill_item)(const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(act) * out, int64_t seq,
                             int64_t kv_head, int64_t block, char *scratch) {
    int64_t group = h->num_heads / h->num_kv_heads, dim = h->head_dim, wide = padded(dim), first = kv_head * group;
    int64_t token = b->cu_seqlens[seq] + block * QUERIES, end = min_of(token + QUERIES, b->cu_seqlens[seq + 1]);
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
        int64_t base = in_tile / TILE_ROWS * TILE_ROWS, height = min_of(TILE_ROWS, some - base);
        FN(act) *y = out + ((token + r / group) * h->num_heads + first + r % group) * dim;
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

/* q and out [num_tokens, num_heads, head_dim]. The K and V of the step are in the pool. Ends with a wait where parts
 * are joined; the caller waits otherwise. */
static void FN(attend)(member *me, const kvb_heads *h, const kvb_batch *b, const FN(act) * q, FN(act) * out, char *work) {
    int64_t decodes = b->num_decodes * h->num_kv_heads * max_parts(b), prefills = 0;
    for (int64_t i = b->num_decodes; i < b->num_seqs; i++) prefills += query_blocks(b, i) * h->num_kv_heads;
    char *scratch = work + me->id * FN(item_bytes)(h);
    float *parts = (float *)(work + me->size * FN(item_bytes)(h));
    share s = share_of(me, prefills, 1);
    for (int64_t from, to; share_take(&s, &from, &to);) {
        /* last block first: it has the longest context */
        int64_t seq = b->num_decodes, left = from;
        while (left >= query_blocks(b, seq) * h->num_kv_heads) left -= query_blocks(b, seq++) * h->num_kv_heads;
        int64_t block = query_blocks(b, seq) - 1 - left / h->num_kv_heads;
        FN(prefill_item)(h, b, q, out, seq, left % h->num_kv_heads, block, scratch);
    }
    s = share_of(me, decodes, decodes / (8 * me->size));
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t item = from; item < to; item++) FN(decode_item)(h, b, q, out, parts, item, scratch);
    if (max_parts(b) > 1 && b->num_decodes) {
        team_wait(me);
        s = share_of(me, b->num_decodes * h->num_heads, 4);
        for (int64_t from, to; share_take(&s, &from, &to);)
            for (int64_t item = from; item < to; item++) FN(join_item)(h, b, out, parts, item);
    }
}

/* The same with q and out in storage type: converted on the way where products take another type. */
static int64_t FN(attend_alone_bytes)(const kvb_heads *h, const kvb_batch *b, int64_t threads) {
    return FN(attention_bytes)(h, b, threads) + 2 * b->num_tokens * h->num_heads * h->head_dim * (int64_t)sizeof(FN(act)) + 64;
}

static void FN(attend_alone)(member *me, const kvb_heads *h, const kvb_batch *b, const FN(store) * q, FN(store) * out,
                             char *work) {
    int64_t row = h->num_heads * h->head_dim, size = b->num_tokens * row;
    if (sizeof *q == sizeof(FN(act))) {
        FN(attend)(me, h, b, (const FN(act) *)(const void *)q, (FN(act) *)(void *)out, work);
        return;
    }
    FN(act) *wide_q = (FN(act) *)(void *)work, *wide_out = wide_q + size;
    share s = share_of(me, b->num_tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);) FN(widen)(q + from * row, wide_q + from * row, (to - from) * row);
    team_wait(me);
    FN(attend)(me, h, b, wide_q, wide_out, work + (2 * size * (int64_t)sizeof(FN(act)) + 63) / 64 * 64);
    team_wait(me);
    s = share_of(me, b->num_tokens, 4);
    for (int64_t from, to; share_take(&s, &from, &to);) FN(narrow)(wide_out + from * row, out + from * row, (to - from) * row);
}
