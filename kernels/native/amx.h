/* bfloat16 products in AMX tiles: Intel processors from Sapphire Rapids on, sixteen rows by sixteen columns an instruction.
 *
 * A packed panel is two B tiles side by side as it lies: 16 pairs of inputs of 16 columns each, rows 128 bytes apart.
 * Up to 32 rows of x are two A tiles, so four tiles of sums take two loads of either side a step of 32 inputs.
 * Tiles have only the rows that x has. Every output takes the same 32 inputs an instruction whatever the number of rows, so
 * a row's result is the same to the last bit alone and in company, if whoever cuts the depth cuts it at multiples of 32.
 *
 * Linux lends tiles to a process that asks for them; where it declines, products take the AVX-512 path, which reads the
 * same panels. Instructions: Intel SDM, chapter "Programming with Intel AMX"; asking: Linux, Documentation/arch/x86/xstate.
 */
#ifndef KVB_AMX_H
#define KVB_AMX_H

#include "simd.h"

#define AMX_ROWS 32   /* of x at a time */
#define AMX_DEPTH 512 /* inputs a pass where many rows go by: a panel's part stays in the first-level cache */

#if defined(BF16_DOT) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX 1
#define AMX_INPUTS 32     /* of an instruction */
#define AMX_ROW_BYTES 128 /* of a panel's pair of inputs, and of 32 sums */

enum { AMX_ON, AMX_OFF, AMX_DECLINED };
static int amx_state = AMX_DECLINED;
static __thread int64_t amx_shaped; /* rows of x that this thread's tiles are shaped for; 0: none */

__attribute__((constructor)) static void amx_ask(void) {
    const char *wish = getenv("KVBATON_AMX");
    if (wish && !strcmp(wish, "0")) amx_state = AMX_OFF;
    else if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0) amx_state = AMX_ON;
}

/* The tile intrinsics do not tell the compiler which memory they read; what was written before this is in memory. */
#define AMX_WRITTEN __asm__ volatile("" ::: "memory");

/* Tiles 0 and 1: sums of the first 16 rows, 2 and 3 of the rest; 4 and 5: x; 6 and 7: the panel. */
static void amx_shape(int64_t rows) {
    if (rows == amx_shaped) return;
    struct {
        uint8_t palette, start_row, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    uint8_t upper = rows < 16 ? (uint8_t)rows : 16, lower = rows > 16 ? (uint8_t)(rows - 16) : 16;
    uint8_t height[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int t = 0; t < 8; t++) shape.row_bytes[t] = 64, shape.rows[t] = height[t];
    __asm__ volatile("" ::"r"(&shape) : "memory");
    _tile_loadconfig(&shape);
    amx_shaped = rows;
}

/* Gives this thread's tiles back: at the end of a phase, so that nothing else ever meets them. */
INLINE void amx_done(void) {
    if (!amx_shaped) return;
    _tile_release();
    amx_shaped = 0;
}

/* A quarter of the cache lines that a step asks for; they go between the tile instructions, which take some 60 cycles. */
#define AMX_ASK                                                                                                        \
    UNROLL for (int i = 0; i < lines / 4; i++) __builtin_prefetch(ahead + 64 * i, 0, 2);                               \
    ahead += 16 * lines;

/* One step of 32 inputs; a's rows are `stride` bytes apart. */
INLINE void amx_step(int two, int lines, const char *a, int64_t stride, const char *b, const char *ahead) {
    AMX_ASK
    _tile_loadd(6, b, AMX_ROW_BYTES);
    _tile_loadd(4, a, stride);
    _tile_dpbf16ps(0, 4, 6);
    AMX_ASK
    _tile_loadd(7, b + 64, AMX_ROW_BYTES);
    _tile_dpbf16ps(1, 4, 7);
    AMX_ASK
    if (two) {
        _tile_loadd(5, a + 16 * stride, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    AMX_ASK
}

typedef struct {
    uint16_t x[AMX_ROWS][AMX_INPUTS], w[AMX_INPUTS / 2][AMX_ROW_BYTES / 2];
} amx_rest;

/* The last inputs, fewer than 32, with zeros behind them: beyond a row of x and beyond a panel lies what others own, or
 * nothing. */
static void __attribute__((noinline)) amx_pad(amx_rest *to, int64_t rows, const uint16_t *x, int64_t x_stride,
                                              const uint16_t *w, int64_t inputs) {
    memset(to, 0, sizeof *to);
    for (int64_t i = 0; i < rows; i++) memcpy(to->x[i], x + i * x_stride, (size_t)inputs * sizeof *x);
    memcpy(to->w, w, (size_t)((inputs + 1) / 2 * AMX_ROW_BYTES));
}

/* amx_tile for one (`two` = 0) or two A tiles, with `lines` cache lines asked for a step; both are constants. */
INLINE void amx_walk(int two, int lines, int64_t rows, const uint16_t *x, int64_t x_stride, const uint16_t *w,
                     int64_t depth, float *sums, int more, const char *ahead) {
    float *low = sums + 16 * (AMX_ROW_BYTES / 4);
    int64_t whole = depth / AMX_INPUTS * AMX_INPUTS, stride = x_stride * (int64_t)sizeof *x;
    const char *a = (const char *)x, *b = (const char *)w;
    if (more) {
        _tile_loadd(0, sums, AMX_ROW_BYTES);
        _tile_loadd(1, sums + 16, AMX_ROW_BYTES);
        if (two) _tile_loadd(2, low, AMX_ROW_BYTES);
        if (two) _tile_loadd(3, low + 16, AMX_ROW_BYTES);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
    }
    for (int64_t k = 0; k < whole; k += AMX_INPUTS) {
        amx_step(two, lines, a, stride, b, ahead);
        a += AMX_INPUTS * sizeof *x, b += AMX_INPUTS / 2 * AMX_ROW_BYTES, ahead += 64 * lines;
    }
    if (whole < depth) {
        amx_rest rest;
        amx_pad(&rest, rows, x + whole, x_stride, (const uint16_t *)(const void *)b, depth - whole);
        AMX_WRITTEN
        amx_step(two, lines, (const char *)rest.x, sizeof rest.x[0], (const char *)rest.w, ahead);
        __asm__ volatile("" ::"r"(&rest) : "memory");
    }
    _tile_stored(0, sums, AMX_ROW_BYTES);
    _tile_stored(1, sums + 16, AMX_ROW_BYTES);
    if (two) _tile_stored(2, low, AMX_ROW_BYTES);
    if (two) _tile_stored(3, low + 16, AMX_ROW_BYTES);
}

/* sums[rows][32] (+)= x[rows][depth] times `depth` inputs of a panel, for 1 to 32 rows. From `ahead` on, `step` bytes of
 * weights are asked for every two inputs: 128, as many as are read, 64 or none. */
static void amx_tile(int64_t rows, const uint16_t *x, int64_t x_stride, const uint16_t *w, int64_t depth, float *sums,
                     int more, const char *ahead, int64_t step) {
    amx_shape(rows);
    AMX_WRITTEN
#define WALK(two, lines) amx_walk(two, lines, rows, x, x_stride, w, depth, sums, more, ahead)
    if (rows <= 16 && step == 128) WALK(0, 32);
    else if (rows <= 16 && step == 64) WALK(0, 16);
    else if (rows <= 16) WALK(0, 0);
    else if (step == 128) WALK(1, 32);
    else if (step == 64) WALK(1, 16);
    else WALK(1, 0);
#undef WALK
}

#else
INLINE void amx_done(void) {}
#endif
#endif
