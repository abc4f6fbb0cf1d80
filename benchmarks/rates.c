/* What the memory and the arithmetic of this machine give, for cpu_floor.py: sums over a buffer, and multiply-adds. */
#include <pthread.h>
#include <stddef.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef unsigned u16x __attribute__((vector_size(64), may_alias));

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    const char *from;
    size_t bytes;
    int streams, ahead;
    unsigned out;
} span;

/* `streams` places at a time, each asked for `ahead` bytes before; 0 leaves that to the processor. */
static void *read_span(void *arg) {
    span *s = arg;
    size_t each = s->bytes / (size_t)s->streams / 256 * 256;
    u16x sum[4] = {{0}};
    for (size_t i = 0; i < each; i += 256)
        for (int k = 0; k < s->streams; k++) {
            const char *at = s->from + (size_t)k * each + i;
            for (int j = 0; j < 4; j++) {
                if (s->ahead) __builtin_prefetch(at + s->ahead + 64 * j);
                sum[j] ^= *(const u16x *)(at + 64 * j);
            }
        }
    u16x all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    s->out = all[0] ^ all[7];
    return NULL;
}

/* Seconds to read `bytes` once with `threads` threads. */
double read_seconds(const char *buffer, size_t bytes, int threads, int streams, int ahead) {
    pthread_t id[256];
    span part[256];
    size_t each = bytes / (size_t)threads / 256 * 256;
    double start = now(CLOCK_MONOTONIC);
    for (int i = 0; i < threads; i++) {
        part[i] = (span){buffer + (size_t)i * each, each, streams, ahead, 0};
        if (i) pthread_create(&id[i], NULL, read_span, &part[i]);
    }
    read_span(&part[0]);
    for (int i = 1; i < threads; i++) pthread_join(id[i], NULL);
    return now(CLOCK_MONOTONIC) - start;
}

#define CHAINS 24

/* Operations a second of one core's own time: multiply-adds counted as two. kind 0: float32; 1: bfloat16 pairs, 0 if there is no such
 * instruction. */
double multiply_rate(int kind, long rounds) {
    v16 acc[CHAINS];
    for (int i = 0; i < CHAINS; i++) acc[i] = (v16){(float)i, 1.0f / (float)(i + 1)}; /* all different, or they are merged */
    double start = now(CLOCK_THREAD_CPUTIME_ID), ops = 0;
    if (kind == 0) {
        v16 x = {0};
        x += 0.5f;
        for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
            for (int i = 0; i < CHAINS; i++) acc[i] += acc[i] * x;
        ops = 32.0 * CHAINS * (double)rounds;
    }
#if defined(__AVX512BF16__)
    if (kind == 1) {
        __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00);
        for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
            for (int i = 0; i < CHAINS; i++) acc[i] = (v16)_mm512_dpbf16_ps((__m512)acc[i], x, x);
        ops = 64.0 * CHAINS * (double)rounds;
    }
#endif
    double took = now(CLOCK_THREAD_CPUTIME_ID) - start;
    volatile float keep = 0;
    for (int i = 0; i < CHAINS; i++) keep += acc[i][0];
    return ops / took;
}
