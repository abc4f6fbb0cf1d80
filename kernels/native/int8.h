/* Products with weights of 8-bit integers: y = (x W^T) * scale + bias, the same panels of 32 columns at a byte a weight.
 *
 * SLICE inputs of a panel at a time become numbers of the type that is multiplied, which is exact. The first tile of rows
 * multiplies while it converts and leaves the numbers for the tiles behind it, so few rows convert in the shadow of the
 * sums and many convert once. The chain of every sum is the one of linear.h, with its promise: a row's result is the same
 * to the last bit alone and in company. Where products are AMX's, all tiles are, behind a conversion of its own.
 */
#ifndef KVB_INT8_ONCE
#define KVB_INT8_ONCE
#ifndef SLICE
#define SLICE 256 /* as floats they fill most of a first-level cache; whole instructions of AMX */
#endif
#ifndef INT8_AHEAD
#define INT8_AHEAD 16384 /* bytes: sooner than AHEAD, for what a step of sums takes it reads half as much */
#endif
#define EACH_SMALL_TILE(M) M(1) M(2) M(3) M(4) M(5) M(6)
#if TILE_ROWS > 6
#define EACH_TILE(M) EACH_SMALL_TILE(M) M(7) M(8) M(9) M(10) M(11) M(12)
#else
#define EACH_TILE(M) EACH_SMALL_TILE(M)
#endif

typedef int8_t vb_any __attribute__((vector_size(LANES), aligned(1), may_alias));

#if defined(BF16_DOT)
/* Two inputs of a panel are 64 bytes. Of every 16, eight belong to columns 0..15 and eight to columns 16..31. */
INLINE int64_t pair_byte(int64_t column, int64_t parity) {
    int64_t at = column % 16 * 2 + parity;
    return at / 8 * 16 + column / 16 * 8 + at % 8;
}

#if defined(__AVX512VBMI__)
/* bfloat16 of 0..127, in two bytes; the sign is the integer's. */
static uint8_t bf16_low[128], bf16_high[128];

__attribute__((constructor)) static void fill_bf16_bytes(void) {
    for (int i = 0; i < 128; i++) bf16_low[i] = (uint8_t)bf16_of((float)i), bf16_high[i] = (uint8_t)(bf16_of((float)i) >> 8);
}

INLINE void widen_pairs(const int8_t *w, __m512i *b) {
    __m512i bytes = _mm512_loadu_si512(w), size = _mm512_abs_epi8(bytes);
    __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(bf16_low), size, _mm512_loadu_si512(bf16_low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(bf16_high), size, _mm512_loadu_si512(bf16_high + 64));
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8((char)0x80), 0xf8); /* high | (bytes & 0x80) */
    b[0] = _mm512_unpacklo_epi8(low, high);
    b[1] = _mm512_unpackhi_epi8(low, high);
}
#else
INLINE __m512 widen_16(const int8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)w)));
}

INLINE void widen_pairs(const int8_t *w, __m512i *b) {
    __m512i front = (__m512i)_mm512_cvtne2ps_pbh(widen_16(w + 16), widen_16(w));
    __m512i back = (__m512i)_mm512_cvtne2ps_pbh(widen_16(w + 48), widen_16(w + 32));
    b[0] = _mm512_shuffle_i64x2(front, back, 0x88);
    b[1] = _mm512_shuffle_i64x2(front, back, 0xdd);
}
#endif
#endif
#endif

/* float16 and, without products of its own, bfloat16 are multiplied as floats: with float32's tiles. */
#undef MULTIPLIED
#undef INT8_PAIRED
#if DTYPE == 2 && defined(BF16_DOT)
#define MULTIPLIED(name) NAME(name, bf16)
#define INT8_PAIRED 1
#else
#define MULTIPLIED(name) NAME(name, f32)
#define INT8_PAIRED 0
#endif

INLINE int64_t FN(int8_size)(int64_t in) { return PANEL * (INT8_PAIRED ? (in + 1) / 2 * 2 : in); }

#if DTYPE == 0 || INT8_PAIRED
/* As TILE of linear.h; the numbers go to wide[depth][PANEL] too. */
#define INT8_TILE(ROWS)                                                                                                \
    static void FN(int8_tile##ROWS)(const FN(act) * x, int64_t x_stride, const int8_t *w, int64_t depth, float *sums,  \
                                    int more, FN(act) * wide) {                                                        \
        for (int at = 0; at < PANEL; at += TILE_COLS) {                                                                \
            vf acc[ROWS][TILE_VECS];                                                                                   \
            UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] =               \
                more ? vload(sums + i * PANEL + at + j * LANES) : (vf){0};                                             \
            INT8_LOOP(ROWS)                                                                                            \
            UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < TILE_VECS; j++)                           \
                vstore(sums + i * PANEL + at + j * LANES, acc[i][j]);                                                  \
        }                                                                                                              \
    }

#undef INT8_LOOP
#if INT8_PAIRED
#define INT8_LOOP(ROWS)                                                                                                \
    for (int64_t k = 0; k < depth; k += 2) {                                                                           \
        __m512i b[TILE_VECS];                                                                                          \
        __builtin_prefetch(w + k * PANEL + INT8_AHEAD, 0, 2);                                                               \
        widen_pairs(w + k * PANEL, b);                                                                                 \
        UNROLL for (int j = 0; j < TILE_VECS; j++) _mm512_storeu_si512(wide + (k * PANEL + j * LANES * 2), b[j]);      \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
            int32_t pair;                                                                                              \
            memcpy(&pair, x + i * x_stride + k, 4);                                                                    \
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);                                                            \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] =                                                     \
                (vf)_mm512_dpbf16_ps((__m512)acc[i][j], a, (__m512bh)b[j]);                                            \
        }                                                                                                              \
    }

static void FN(int8_widen)(const int8_t *w, int64_t depth, FN(act) * wide) {
    for (int64_t at = 0; at < depth * PANEL; at += 64) {
        __m512i b[2];
        __builtin_prefetch(w + at + INT8_AHEAD, 0, 2);
        widen_pairs(w + at, b);
        _mm512_storeu_si512(wide + at, b[0]);
        _mm512_storeu_si512(wide + at + 32, b[1]);
    }
}
#else
#define INT8_LOOP(ROWS)                                                                                                \
    for (int64_t k = 0; k < depth; k++) {                                                                              \
        const int8_t *row = w + k * PANEL + at;                                                                        \
        vf b[TILE_VECS];                                                                                               \
        __builtin_prefetch(row + INT8_AHEAD, 0, 2);                                                                         \
        UNROLL for (int j = 0; j < TILE_VECS; j++) {                                                                   \
            b[j] = __builtin_convertvector(*(const vb_any *)(row + j * LANES), vf);                                    \
            vstore(wide + k * PANEL + at + j * LANES, b[j]);                                                           \
        }                                                                                                              \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
            vf a = splat(x[i * x_stride + k]);                                                                         \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[i][j] += a * b[j];                                          \
        }                                                                                                              \
    }
#endif

EACH_TILE(INT8_TILE)
#undef INT8_TILE

static void FN(int8_tile)(int64_t rows, const FN(act) * x, int64_t x_stride, const int8_t *w, int64_t depth, float *sums,
                          int more, FN(act) * wide) {
#define CASE(ROWS)                                                                                                     \
    case ROWS: FN(int8_tile##ROWS)(x, x_stride, w, depth, sums, more, wide); return;
    switch (rows) { EACH_TILE(CASE) }
#undef CASE
}
#endif

/* Rows first..last of one panel of columns. */
static void FN(int8_panel)(const FN(product) * p, int64_t panel, int64_t first, int64_t last) {
    const int8_t *w = (const int8_t *)p->w + panel * FN(int8_size)(p->in);
    float sums[ROW_BLOCK * PANEL] __attribute__((aligned(64)));
    FN(act) wide[SLICE * PANEL] __attribute__((aligned(64)));
    int64_t height = FN(tile_rows)(), block = ROW_BLOCK / height * height;
    for (int64_t row = first; row < last; row += block) {
        int64_t end = row + block < last ? row + block : last;
        for (int64_t k = 0; k < p->in; k += SLICE) {
            int64_t depth = p->in - k < SLICE ? p->in - k : SLICE, at = row;
            const int8_t *slice = w + k * PANEL;
            int converted = 0;
#if INT8_PAIRED
            if (IN_AMX) FN(int8_widen)(slice, depth, wide), converted = 1;
#endif
            for (int64_t tiles = (end - row + height - 1) / height; tiles; tiles--, converted = 1) {
                int64_t rows = (end - at + tiles - 1) / tiles;
                const FN(act) *x = p->x + at * p->x_stride + k;
                float *to = sums + (at - row) * PANEL;
                if (converted) MULTIPLIED(tile)(rows, x, p->x_stride, wide, depth, to, k > 0, (const char *)wide, 0);
                else MULTIPLIED(int8_tile)(rows, x, p->x_stride, slice, depth, to, k > 0, wide);
                at += rows;
            }
        }
        FN(finish)(p, sums, row, end - row, panel * PANEL);
    }
}

/* As FN(pack) of linear.h, of integers. */
static void FN(int8_pack)(const int8_t *weight, int8_t *packed, int64_t out, int64_t in, int interleave) {
    int64_t half = out / 2, depth = FN(int8_size)(in) / PANEL;
    int64_t panels = interleave ? (half + 15) / 16 : (out + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < PANEL; c++) {
            int64_t row = interleave ? p * 16 + c % 16 : p * PANEL + c;
            int real = row < (interleave ? half : out);
            const int8_t *from = weight + (row + (interleave && c >= 16 ? half : 0)) * in;
            int8_t *to = packed + p * PANEL * depth;
            for (int64_t k = 0; k < depth; k++) {
#if INT8_PAIRED
                int64_t at = k / 2 * (2 * PANEL) + pair_byte(c, k % 2);
#else
                int64_t at = k * PANEL + c;
#endif
                to[at] = real && k < in ? from[k] : 0;
            }
        }
}
