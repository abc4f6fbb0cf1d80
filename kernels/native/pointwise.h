/* Norms, rotary embedding with the KV write, and reading an embedding back out of packed weights. */

/* y = x / rms(x) * weight, in float inside, rounded once. */
#define NORM_BODY(PUT, PUT_N)                                                                                          \
    vf squares = {0};                                                                                                  \
    int64_t whole = n / LANES * LANES;                                                                                 \
    for (int64_t i = 0; i < whole; i += LANES) {                                                                       \
        vf v = FN(load)(x + i);                                                                                        \
        squares += v * v;                                                                                              \
    }                                                                                                                  \
    if (whole < n) {                                                                                                   \
        vf v = FN(load_n)(x + whole, n - whole);                                                                       \
        squares += v * v;                                                                                              \
    }                                                                                                                  \
    float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)n + (float)eps);                                          \
    for (int64_t i = 0; i < whole; i += LANES) PUT(y + i, FN(load)(weight + i) * (FN(load)(x + i) * inverse)); \
    if (whole < n)                                                                                                     \
        PUT_N(y + whole, FN(load_n)(weight + whole, n - whole) * (FN(load_n)(x + whole, n - whole) * inverse), \
              n - whole);

static void FN(norm_act)(const FN(store) * x, const FN(store) * weight, FN(act) * y, int64_t n, double eps) {
    NORM_BODY(FN(put_act), FN(put_act_n))
}
static void FN(norm)(const FN(store) * x, const FN(store) * weight, FN(store) * y, int64_t n, double eps) {
    NORM_BODY(FN(put), FN(put_n))
}
#undef NORM_BODY

/* Rotates x [n] in place over its first 2 * half elements: element i and i + half are one plane. */
static void FN(rotate)(FN(store) * x, const float *cos, const float *sin, int64_t half) {
    int64_t whole = half / LANES * LANES;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = half - i;
        if (i < whole) {
            vf a = FN(load)(x + i), b = FN(load)(x + half + i), c = vload(cos + i), s = vload(sin + i);
            FN(put)(x + i, a * c - b * s);
            FN(put)(x + half + i, b * c + a * s);
        } else {
            float part[2][LANES] = {{0}};
            memcpy(part[0], cos + i, (size_t)n * 4);
            memcpy(part[1], sin + i, (size_t)n * 4);
            vf a = FN(load_n)(x + i, n), b = FN(load_n)(x + half + i, n), c = vload(part[0]), s = vload(part[1]);
            FN(put_n)(x + i, a * c - b * s, n);
            FN(put_n)(x + half + i, b * c + a * s, n);
        }
    }
}

INLINE void FN(widen)(const FN(store) * x, FN(act) * y, int64_t n) {
    if (sizeof(FN(store)) == sizeof(FN(act))) {
        memcpy(y, x, (size_t)n * sizeof *x);
        return;
    }
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) FN(put_act)(y + i, FN(load)(x + i));
    if (whole < n) FN(put_act_n)(y + whole, FN(load_n)(x + whole, n - whole), n - whole);
}

INLINE void FN(narrow)(const FN(act) * x, FN(store) * y, int64_t n) {
    if (sizeof(FN(store)) == sizeof(FN(act))) {
        memcpy(y, x, (size_t)n * sizeof *y);
        return;
    }
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) FN(put)(y + i, FN(load_act)(x + i));
    if (whole < n) FN(put_n)(y + whole, FN(load_act_n)(x + whole, n - whole), n - whole);
}

/* Row `row` of a packed [out, in] weight. */
static void FN(packed_row)(const FN(store) * packed, int64_t row, int64_t in, FN(store) * y) {
    const FN(store) *panel = packed + row / PANEL * FN(panel_size)(in);
    int64_t c = row % PANEL;
    for (int64_t k = 0; k < in; k++) y[k] = PAIRED ? panel[(k / 2 * PANEL + c) * 2 + k % 2] : panel[k * PANEL + c];
}
