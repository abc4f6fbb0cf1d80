/* One storage type: included once for each with DTYPE defined; every name gets its suffix through FN().
 *
 *   store  the type in memory: weights, KV pool, residual stream
 *   act    the type of what goes into a product: `store` where bfloat16 pairs are multiplied as they are, else float
 *          holding values already rounded to `store`
 */
#include "simd.h"

#undef FN
#undef NAME
#undef NAME_
#undef PAIRED
#define NAME_(name, suffix) name##_##suffix
#define NAME(name, suffix) NAME_(name, suffix)

#if DTYPE == 0
#define FN(name) NAME(name, f32)
#define PAIRED 0
typedef float FN(store);
typedef float FN(act);
INLINE vf FN(load)(const float *p) { return vload(p); }
INLINE void FN(put)(float *p, vf v) { vstore(p, v); }
INLINE vf FN(rounded)(vf v) { return v; }
#elif DTYPE == 1
#define FN(name) NAME(name, f16)
#define PAIRED 0
typedef uint16_t FN(store);
typedef float FN(act);
INLINE vf FN(load)(const uint16_t *p) { return vload_h16(p); }
INLINE void FN(put)(uint16_t *p, vf v) { vstore_h16(p, v); }
INLINE vf FN(rounded)(vf v) {
    uint16_t h[LANES];
    vstore_h16(h, v);
    return vload_h16(h);
}
#else
#define FN(name) NAME(name, bf16)
#define PAIRED 1
typedef uint16_t FN(store);
#if defined(BF16_DOT)
typedef uint16_t FN(act);
#else
typedef float FN(act);
#endif
INLINE vf FN(load)(const uint16_t *p) { return vload_b16(p); }
INLINE void FN(put)(uint16_t *p, vf v) { vstore_b16(p, v); }
INLINE vf FN(rounded)(vf v) {
    uint16_t h[LANES];
    vstore_b16(h, v);
    return vload_b16(h);
}
#endif

#if DTYPE == 2 && defined(BF16_DOT)
INLINE vf FN(load_act)(const FN(act) * p) { return vload_b16(p); }
INLINE void FN(put_act)(FN(act) * p, vf v) { vstore_b16(p, v); }
#else
INLINE vf FN(load_act)(const FN(act) * p) { return vload(p); }
INLINE void FN(put_act)(FN(act) * p, vf v) { vstore(p, FN(rounded)(v)); }
#endif

/* The first n < LANES elements; the rest of a loaded vector is 0. */
INLINE vf FN(load_n)(const FN(store) * p, int64_t n) {
    FN(store) part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return FN(load)(part);
}
INLINE void FN(put_n)(FN(store) * p, vf v, int64_t n) {
    FN(store) part[LANES];
    FN(put)(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}
INLINE void FN(put_act_n)(FN(act) * p, vf v, int64_t n) {
    FN(act) part[LANES];
    FN(put_act)(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}
INLINE vf FN(load_act_n)(const FN(act) * p, int64_t n) {
    FN(act) part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return FN(load_act)(part);
}

#include "linear.h"
#include "int8.h"
#include "pointwise.h"
#include "attention.h"
#include "decoder.h"
