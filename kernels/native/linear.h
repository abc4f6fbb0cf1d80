/* Products with packed weights: y = x W^T + bias, a panel of 32 output columns at a time.
 *
 * Every output is one chain of multiply-adds over the inputs in order, whatever the number of rows, so a row's result is
 * the same to the last bit alone and in company. Where the processor has AMX, all bfloat16 tiles are those of amx.h.
 */

#ifndef KVB_LINEAR_ONCE
#define KVB_LINEAR_ONCE
#include "amx.h"

#define PANEL 32
#if LANES == 16
#define TILE_ROWS 12 /* 12 x 2 accumulators of 32 registers */
#define TILE_COLS 32
#elif LANES == 8
#define TILE_ROWS 6 /* 6 x 2 of 16 */
#define TILE_COLS 16
#else
#define TILE_ROWS 6
#define TILE_COLS 8
#endif
#define TILE_VECS (TILE_COLS / LANES)
#define DEPTH 4096 /* inputs a pass: a panel's part stays in the second-level cache */
#define ROW_BLOCK 240 /* rows whose partial sums are kept when there is more than one pass; whole tiles */
#ifndef X_BYTES
#define X_BYTES (1 << 20) /* of rows that are worked on together */
#endif
#ifndef AHEAD
#define AHEAD 4096 /* bytes: how far before its use a weight is asked for when it is used once */
#endif
/* Two cache lines a step from `ahead` on. */
#define ASK_AHEAD __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + 64, 0, 2), ahead += step;

enum { TO_STORE, TO_RESIDUAL, TO_SWIGLU, TO_FLOAT };
#endif

typedef struct {
    const FN(act) * x; /* [rows][in] */
    const void *w;      /* panels of store; of int8.h where there is a scale */
    const float *scale; /* whole panels, or NULL */
    const float *bias;  /* the same */
    void *y;           /* [rows][out]; TO_SWIGLU: act [rows][out / 2] */
    int64_t rows, in, out, x_stride, y_stride;
    int to;
} FN(product);

/* From one row of `n` to the next, where products read many: a tile's rows must not meet in one set of the first-level
 * cache, as rows do that are whole pages apart. */
INLINE int64_t FN(apart)(int64_t n) {
    int64_t size = sizeof(FN(act));
    return n * size % 4096 ? n : n + 64 / size;
}

INLINE int64_t FN(panel_size)(int64_t in) { return PANEL * (PAIRED ? (in + 1) / 2 * 2 : in); }

#undef IN_AMX
#if DTYPE == 2 && defined(AMX)
#define IN_AMX (amx_state == AMX_ON)
#else
#define IN_AMX 0
#endif
/* Rows that FN(tile) takes at most. */
INLINE int64_t FN(tile_rows)(void) { return IN_AMX ? AMX_ROWS : TILE_ROWS; }

/* sums[rows][PANEL] (+)= x[rows][depth] times `depth` inputs of a panel. */
#define TILE(ROWS)                                                                                                     \
    static void FN(tile##ROWS)(const FN(act) * x, int64_t x_stride, const FN(store) * w, int64_t depth, float *sums,   \
                               int more, const char *ahead, int64_t step) {                                                                             \
        for (int at = 0; at < PANEL; at += TILE_COLS) {                                                                \
            vf acc[ROWS][TILE_VECS];                                                                                   \
            UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] =               \
                more ? vload(sums + i * PANEL + at + j * LANES) : (vf){0};                                          \
            TILE_LOOP(ROWS)                                                                                            \
            UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < TILE_VECS; j++)                           \
                vstore(sums + i * PANEL + at + j * LANES, acc[i][j]);                                               \
        }                                                                                                              \
    }

#undef STEP
#define STEP ((int64_t)sizeof(FN(store)) * TILE_COLS * (PAIRED ? 2 : 1)) /* bytes of weights that a step reads */
#undef TILE_LOOP
#if DTYPE == 2 && defined(BF16_DOT)
#define TILE_LOOP(ROWS)                                                                                                \
    for (int64_t k = 0; k < depth; k += 2) {                                                                           \
        const uint16_t *row = w + k * PANEL + at * 2;                                                                  \
        ASK_AHEAD                                                                                                      \
        __m512bh b[TILE_VECS];                                                                                         \
        UNROLL for (int j = 0; j < TILE_VECS; j++) {                                                                   \
            b[j] = (__m512bh)_mm512_loadu_si512(row + j * LANES * 2);                                                  \
        }                                                                                                              \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
            int32_t pair;                                                                                              \
            memcpy(&pair, x + i * x_stride + k, 4);                                                                    \
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);                                                            \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], a, b[j]);   \
        }                                                                                                              \
    }
#elif DTYPE == 2
#define TILE_LOOP(ROWS)                                                                                                \
    for (int64_t k = 0; k < depth; k += 2) {                                                                           \
        const uint16_t *row = w + k * PANEL + at * 2;                                                                  \
        ASK_AHEAD                                                                                                      \
        vf even[TILE_VECS], odd[TILE_VECS];                                                                            \
        UNROLL for (int j = 0; j < TILE_VECS; j++) {                                                                   \
            vu both = *(const vu_any *)(row + j * LANES * 2);                                                          \
            even[j] = (vf)(both << 16);                                                                                \
            odd[j] = (vf)(both & 0xffff0000u);                                                                         \
        }                                                                                                              \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
            vf a = splat(x[i * x_stride + k]), c = splat(x[i * x_stride + k + 1]);                                     \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] += a * even[j];                                       \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] += c * odd[j];                                        \
        }                                                                                                              \
    }
#else
#define TILE_LOOP(ROWS)                                                                                                \
    for (int64_t k = 0; k < depth; k++) {                                                                              \
        const FN(store) *row = w + k * PANEL + at;                                                                     \
        ASK_AHEAD                                                                                                      \
        vf b[TILE_VECS];                                                                                               \
        UNROLL for (int j = 0; j < TILE_VECS; j++) {                                                                   \
            b[j] = FN(load)(row + j * LANES);                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
            vf a = splat(x[i * x_stride + k]);                                                                         \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] += a * b[j];                                          \
        }                                                                                                              \
    }
#endif

TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
#if TILE_ROWS > 6
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)
#endif
#undef TILE

static void FN(tile)(int64_t rows, const FN(act) * x, int64_t x_stride, const FN(store) * w, int64_t depth, float *sums,
                     int more, const char *ahead, int64_t step) {
#if DTYPE == 2 && defined(AMX)
    if (IN_AMX) {
        amx_tile(rows, x, x_stride, w, depth, sums, more, ahead, step);
        return;
    }
#endif
    switch (rows) {
#define CASE(ROWS)                                                                                                     \
    case ROWS: FN(tile##ROWS)(x, x_stride, w, depth, sums, more, ahead, step); return;
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
#if TILE_ROWS > 6
        CASE(7)
        CASE(8)
        CASE(9)
        CASE(10)
        CASE(11)
        CASE(12)
#endif
#undef CASE
    }
}

INLINE vf FN(swiglu)(vf gate, vf up) { return gate / (vexp(vmin(-gate, splat(88.0f))) + 1.0f) * up; }

/* Writes sums [rows][PANEL] of columns col.. to rows first.. of the product's output. */
static void FN(finish)(const FN(product) * p, const float *sums, int64_t first, int64_t rows, int64_t col) {
    int64_t width = p->out - col < PANEL ? p->out - col : PANEL;
    for (int64_t i = 0; i < rows; i++) {
        vf v[PANEL / LANES];
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            v[j] = vload(sums + i * PANEL + j * LANES);
            if (p->scale) v[j] *= vload(p->scale + col + j * LANES);
            if (p->bias) v[j] += vload(p->bias + col + j * LANES);
        }
        if (p->to == TO_SWIGLU) {
            FN(act) *y = (FN(act) *)p->y + (first + i) * p->y_stride + col / 2;
            for (int j = 0; j < 16 / LANES; j++) {
                vf inner = FN(swiglu)(v[j], v[j + 16 / LANES]);
                int64_t n = width / 2 - j * LANES;
                if (n >= LANES) FN(put_act)(y + j * LANES, inner);
                else if (n > 0) FN(put_act_n)(y + j * LANES, inner, n);
            }
            continue;
        }
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            int64_t n = width - j * LANES;
            if (n <= 0) break;
            int64_t at = (first + i) * p->y_stride + col + j * LANES;
            if (p->to == TO_FLOAT) {
                float *y = (float *)p->y + at;
                if (n >= LANES) vstore(y, v[j]);
                else for (int64_t c = 0; c < n; c++) y[c] = v[j][c];
                continue;
            }
            FN(store) *y = (FN(store) *)p->y + at;
            if (n >= LANES) {
                FN(put)(y, p->to == TO_RESIDUAL ? v[j] + FN(load)(y) : v[j]);
            } else {
                FN(put_n)(y, p->to == TO_RESIDUAL ? v[j] + FN(load_n)(y, n) : v[j], n);
            }
        }
    }
}

static void FN(int8_panel)(const FN(product) * p, int64_t panel, int64_t first, int64_t last);

/* Rows first..last of one panel of columns. */
static void FN(panel)(const FN(product) * p, int64_t panel, int64_t first, int64_t last) {
    const FN(store) *w = (const FN(store) *)p->w + panel * FN(panel_size)(p->in);
    float sums[ROW_BLOCK * PANEL] __attribute__((aligned(64)));
    int64_t height = FN(tile_rows)(), tiles = (last - first + height - 1) / height;
    int64_t pass = IN_AMX && tiles > 2 ? AMX_DEPTH : DEPTH, block = ROW_BLOCK / height * height;
    if (p->in <= pass) { /* one pass: tiles of even size */
        int64_t bytes = FN(panel_size)(p->in) * (int64_t)sizeof *w;
        const char *ahead = (const char *)w + (tiles > 1 ? bytes : AHEAD);
        for (int64_t row = first, n = 0; tiles; tiles--, n++) {
            int64_t rows = (last - row + tiles - 1) / tiles;
            const char *ask = n < 2 ? ahead + n * bytes / 2 : (const char *)w;
            FN(tile)(rows, p->x + row * p->x_stride, p->x_stride, w, p->in, sums, 0, ask, n || tiles > 1 ? STEP / 2 : STEP);
            FN(finish)(p, sums, row, rows, panel * PANEL);
            row += rows;
        }
        return;
    }
    for (int64_t row = first; row < last; row += block) {
        int64_t end = row + block < last ? row + block : last;
        for (int64_t k = 0; k < p->in; k += pass) {
            int64_t depth = p->in - k < pass ? p->in - k : pass, bytes = depth * PANEL * (int64_t)sizeof *w;
            const char *part = (const char *)(w + k * PANEL);
            for (int64_t at = row; at < end; at += height) {
                int64_t rows = end - at < height ? end - at : height, n = (at - row) / height, step = STEP;
                const char *ask = part + AHEAD;
                if (pass < DEPTH) { /* short parts: the first two tiles ask for the next one, the others for nothing */
                    ask = part + bytes + n * bytes / 2;
                    step = n < 2 ? STEP / 2 : 0;
                }
                FN(tile)(rows, p->x + at * p->x_stride + k, p->x_stride, w + k * PANEL, depth, sums + (at - row) * PANEL,
                         k > 0, ask, step);
            }
        }
        FN(finish)(p, sums, row, end - row, panel * PANEL);
    }
}

/* One phase: all members work on panels; rows are cut where they would not stay in the cache from one panel to the next,
 * or where there are too few panels to share out. */
static void FN(multiply)(member *me, const FN(product) * p) {
    int64_t panels = (p->out + PANEL - 1) / PANEL, rows = X_BYTES / (p->in * (int64_t)sizeof *p->x) + 1;
    int64_t cuts = (p->rows + rows - 1) / rows;
    while (panels * cuts < 4 * me->size && p->rows / (cuts + 1) >= 2 * FN(tile_rows)()) cuts++;
    share s = share_of(me, panels * cuts, panels / (8 * me->size));
    for (int64_t from, to; share_take(&s, &from, &to);)
        for (int64_t item = from; item < to; item++) {
            int64_t cut = item / panels;
            (p->scale ? FN(int8_panel) : FN(panel))(p, item % panels, p->rows * cut / cuts, p->rows * (cut + 1) / cuts);
        }
    amx_done();
}

/* Packs rows of weight [out][in] into panels. `interleave`: 16 rows of the first half, then 16 of the second. */
static void FN(pack)(const FN(store) * weight, FN(store) * packed, int64_t out, int64_t in, int interleave) {
    int64_t half = out / 2, depth = FN(panel_size)(in) / PANEL;
    int64_t panels = interleave ? (half + 15) / 16 : (out + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < PANEL; c++) {
            int64_t row = interleave ? p * 16 + c % 16 : p * PANEL + c;
            int real = row < (interleave ? half : out);
            const FN(store) *from = weight + (row + (interleave && c >= 16 ? half : 0)) * in;
            FN(store) *to = packed + p * PANEL * depth;
            for (int64_t k = 0; k < depth; k++) {
                FN(store) value = real && k < in ? from[k] : 0;
                if (PAIRED) to[(k / 2 * PANEL + c) * 2 + k % 2] = value;
                else to[k * PANEL + c] = value;
            }
        }
}
