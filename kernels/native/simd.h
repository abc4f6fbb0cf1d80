/* Vectors of float as wide as the machine has them, in GCC's portable vector notation, and the 16-bit formats.
 *
 * LANES floats a vector: 16 with AVX-512, 8 with AVX2, else 4. Intrinsics appear only where the notation has no word
 * for an instruction that matters (bfloat16 dot products, half conversions, transposing sums).
 */
#ifndef KVB_SIMD_H
#define KVB_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LANES 16
#define WIDE_X86 1
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(WIDE_X86) && defined(__AVX512BF16__)
#define BF16_DOT 1 /* vdpbf16ps: sums of two bfloat16 products at a time */
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf vload(const float *p) { return *(const vf_any *)p; }
INLINE void vstore(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return pick(a < b, a, b); }

INLINE float sum_lanes(vf v) {
    float s[LANES];
    vstore(s, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

INLINE float max_lanes(vf v) {
    float m[LANES], best;
    vstore(m, v);
    best = m[0];
    for (int i = 1; i < LANES; i++) best = m[i] > best ? m[i] : best;
    return best;
}

/* ---- bfloat16: the upper half of a float, rounded to nearest even ---- */

INLINE vf vload_b16(const uint16_t *p) {
    vu wide = __builtin_convertvector(*(const vh_any *)p, vu);
    return (vf)(wide << 16);
}

INLINE uint16_t bf16_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40); /* NaN stays NaN */
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float float_of_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

INLINE void vstore_b16(uint16_t *p, vf v) {
#if defined(BF16_DOT)
    __m256bh packed = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &packed, sizeof packed);
#else
    vu u = (vu)v, nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu bits = (((u >> 16) | 0x40) & nan) | (rounded & ~nan);
    *(vh_any *)p = __builtin_convertvector(bits, vh);
#endif
}

/* ---- float16 ---- */

#if defined(__F16C__) && LANES >= 8
INLINE vf vload_h16(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#else
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#endif
}
INLINE void vstore_h16(uint16_t *p, vf v) {
#if LANES == 16
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
INLINE vf vload_h16(const uint16_t *p) {
    float wide[LANES];
    for (int i = 0; i < LANES; i++) {
        _Float16 h;
        memcpy(&h, p + i, 2);
        wide[i] = (float)h;
    }
    return vload(wide);
}
INLINE void vstore_h16(uint16_t *p, vf v) {
    for (int i = 0; i < LANES; i++) {
        _Float16 h = (_Float16)v[i];
        memcpy(p + i, &h, 2);
    }
}
#endif

/* e**x for x <= 88, within two units in the last place; exactly 0 below -87, so that masked scores vanish. */
INLINE vf vexp(vf x) {
    vf clamped = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
    vf turns = clamped * 1.44269504088896341f + 12582912.0f; /* adding 1.5 * 2**23 rounds to an integer */
    vi n = (vi)turns - 0x4b400000;
    turns -= 12582912.0f;
    vf r = clamped - turns * 0.693359375f;
    r = r + turns * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf scaled = (vf)((vi)p + (n << 23));
    return pick(x < splat(-87.0f), splat(0.0f), scaled);
}

/* Sums of 16 vectors, as 16 floats: out[i] = sum of the lanes of v[i]. */
INLINE void sum_lanes_16(const vf *v, float *out) {
#if LANES == 16
    __m512 t[8], u[4];
    UNROLL for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd)));
#else
    for (int i = 0; i < 16; i++) out[i] = sum_lanes(v[i]);
#endif
}

#endif
