/* The AMX instructions that amx.h uses, for processors without them: linked into a build of the native library, whose own
 * machine code then runs anywhere. An instruction that the processor does not know raises SIGILL; the handler decodes it, does
 * its work in C and goes on behind it. What real tiles would refuse ends the process with a line on stderr.
 *
 * Link with --wrap=syscall: the library's question for permission arrives here first. A system that says yes has tiles, and
 * they are used; then nothing traps. KVB_TEST_DECLINE=1 plays a system that says no.
 * Semantics: Intel SDM, volume 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS.
 */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>

#define NAMES 8
#define ROWS 16
#define ROW_BYTES 64

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} shape;

static __thread shape config; /* palette 0: not configured */
static __thread uint8_t tiles[NAMES][ROWS][ROW_BYTES];
static struct sigaction before;
static long performed;

/* Instructions done here so far; 0 where the processor has tiles. */
long amx_instructions(void) { return __atomic_load_n(&performed, __ATOMIC_RELAXED); }

/* Whether the calling thread has emulated tiles that it has not given back. */
long amx_configured(void) { return config.palette; }

static void refuse(const char *why) {
    fprintf(stderr, "tile fault: %s\n", why);
    abort();
}

static void need(int fine, const char *why) {
    if (!fine) refuse(why);
}

static void load_config(const char *at) {
    shape s;
    memcpy(&s, at, sizeof s);
    need(s.palette == 1 && !s.start_row, "palette or start row");
    for (int i = 0; i < 14; i++) need(!s.reserved[i], "reserved byte");
    for (int t = 0; t < 16; t++) {
        need(t < NAMES || (!s.colsb[t] && !s.rows[t]), "shape of a tile that there is not");
        need(s.colsb[t] <= ROW_BYTES && s.rows[t] <= ROWS && !s.colsb[t] == !s.rows[t], "shape of a tile");
    }
    config = s;
    memset(tiles, 0, sizeof tiles);
}

static void need_tile(int t) { need(config.palette && t < NAMES && config.rows[t], "tile that is not configured"); }

static void load_tile(int t, const char *at, int64_t stride) {
    need_tile(t);
    memset(tiles[t], 0, sizeof tiles[t]);
    for (int r = 0; r < config.rows[t]; r++) memcpy(tiles[t][r], at + r * stride, config.colsb[t]);
}

static void store_tile(int t, char *at, int64_t stride) {
    need_tile(t);
    for (int r = 0; r < config.rows[t]; r++) memcpy(at + r * stride, tiles[t][r], config.colsb[t]);
}

/* Denormals are zeros, before and after. */
static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

/* A row of bfloat16 pairs as floats: the first of each pair, then the second of each. */
static void widen(const uint8_t *row, int pairs, float to[2][ROW_BYTES / 4]) {
    for (int i = 0; i < 2 * pairs; i++) {
        uint16_t h;
        memcpy(&h, row + 2 * i, 2);
        uint32_t u = (uint32_t)h << 16;
        float x;
        memcpy(&x, &u, 4);
        to[i % 2][i / 2] = flushed(x);
    }
}

/* Even and odd inputs are two chains of fused multiply-adds from zero; their sum is added to the destination. */
static void multiply(int c, int a, int b) {
    need_tile(c), need_tile(a), need_tile(b);
    need(c != a && c != b && a != b, "operands that are the same tile");
    need(config.rows[c] == config.rows[a] && config.colsb[c] == config.colsb[b], "shape of the destination");
    need(config.colsb[a] == 4 * config.rows[b] && config.colsb[b] % 4 == 0, "depth of the product");
    int depth = config.rows[b], width = config.colsb[c] / 4;
    float right[ROWS][2][ROW_BYTES / 4];
    for (int k = 0; k < depth; k++) widen(tiles[b][k], width, right[k]);
    for (int m = 0; m < config.rows[c]; m++) {
        float left[2][ROW_BYTES / 4], chains[2][ROW_BYTES / 4] = {{0}}, sums[ROW_BYTES / 4];
        widen(tiles[a][m], depth, left);
        for (int k = 0; k < depth; k++)
            for (int odd = 0; odd < 2; odd++)
                for (int n = 0; n < width; n++)
                    chains[odd][n] = flushed(fmaf(left[odd][k], right[k][odd][n], chains[odd][n]));
        memcpy(sums, tiles[c][m], sizeof sums);
        for (int n = 0; n < width; n++) sums[n] = flushed(flushed(sums[n]) + flushed(chains[0][n] + chains[1][n]));
        memcpy(tiles[c][m], sums, sizeof sums);
    }
}

typedef struct {
    int prefix, opcode, mod, reg, rm, vvvv;
    char *at;       /* the memory operand, where there is one */
    int64_t stride; /* and its index register, scaled */
    int bytes;
} instruction;

static int64_t general(const greg_t *regs, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return regs[places[number]];
}

/* The memory operand: base + displacement, and index * scale apart from it. */
static void decode_memory(instruction *i, const uint8_t *p, const greg_t *regs, int x, int b) {
    int64_t base = 0, displacement = 0;
    int low = i->rm, has_base = 1;
    if (i->rm == 4) {
        int sib = p[i->bytes++], index = (sib >> 3 & 7) | x << 3;
        low = sib & 7;
        has_base = low != 5 || i->mod;
        i->stride = index == 4 ? 0 : general(regs, index) << (sib >> 6);
    }
    int relative = i->rm == 5 && !i->mod;
    if (i->mod == 1) displacement = (int8_t)p[i->bytes++];
    if (i->mod == 2 || relative || !has_base) {
        int32_t wide;
        memcpy(&wide, p + i->bytes, 4);
        displacement = wide;
        i->bytes += 4;
    }
    if (relative) base = (int64_t)(p + i->bytes);
    else if (has_base) base = general(regs, low | b << 3);
    i->at = (char *)(base + displacement);
}

/* A three-byte VEX instruction of map 0F38; 0 for anything else. */
static int decode(instruction *i, const uint8_t *p, const greg_t *regs) {
    if (p[0] != 0xc4 || (p[1] & 31) != 2 || p[2] & 0x84) return 0;
    *i = (instruction){.prefix = p[2] & 3, .opcode = p[3], .mod = p[4] >> 6, .reg = p[4] >> 3 & 7, .rm = p[4] & 7,
                       .vvvv = ~p[2] >> 3 & 15, .bytes = 5};
    if (i->mod != 3) decode_memory(i, p, regs, ~p[1] >> 6 & 1, ~p[1] >> 5 & 1);
    return 1;
}

/* 0 for an instruction that is none of the tiles'. */
static int perform(const instruction *i) {
    enum { NONE, P66, PF3, PF2 };
    int memory = i->mod != 3;
    if (i->opcode == 0x49 && i->prefix == NONE && memory) load_config(i->at);
    else if (i->opcode == 0x49 && i->prefix == NONE) memset(&config, 0, sizeof config);
    else if (i->opcode == 0x49 && i->prefix == PF2 && !memory) need_tile(i->reg), memset(tiles[i->reg], 0, sizeof tiles[0]);
    else if (i->opcode == 0x4b && i->prefix == PF2 && memory) load_tile(i->reg, i->at, i->stride);
    else if (i->opcode == 0x4b && i->prefix == PF3 && memory) store_tile(i->reg, i->at, i->stride);
    else if (i->opcode == 0x5c && i->prefix == PF3 && !memory) multiply(i->reg, i->rm, i->vvvv);
    else return 0;
    return 1;
}

/* A signal takes far longer than the work, so instructions right behind one another are done at once. */
static void on_illegal(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    instruction i;
    int done = 0;
    for (; decode(&i, (const uint8_t *)regs[REG_RIP], regs) && perform(&i); done++) regs[REG_RIP] += i.bytes;
    if (!done) sigaction(number, &before, NULL); /* it happens again, for whoever was there before */
    __atomic_fetch_add(&performed, done, __ATOMIC_RELAXED);
}

long __real_syscall(long number, ...);

long __wrap_syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long option = va_arg(list, long), feature = va_arg(list, long);
    va_end(list);
    if (number != SYS_arch_prctl) refuse("another system call than the question for tiles");
    const char *decline = getenv("KVB_TEST_DECLINE");
    if (decline && *decline == '1') return -1;
    if (__real_syscall(number, option, feature) == 0) return 0;
    struct sigaction ours = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    return sigaction(SIGILL, &ours, &before);
}
