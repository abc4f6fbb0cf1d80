/* The C interface, as `kernels/native_lib.py` declares it for ctypes. All counts are int64, all tensors contiguous.
 *
 * A model's storage type is float32, float16 or bfloat16. Linear weights are packed by `kvb_pack`, or by `kvb_pack_int8`:
 *   panels of 32 output columns, each [in][32]; bfloat16: [in / 2][32][2], pairs of inputs side by side
 * `gate_up` panels hold 16 gate columns and the 16 up columns of the same numbers.
 */
#ifndef KVB_H
#define KVB_H

#include <stdint.h>

#include "team.h"

enum { KVB_F32 = 0, KVB_F16 = 1, KVB_BF16 = 2 };
enum { KVB_EMBED, KVB_NORM, KVB_QKV, KVB_TURN, KVB_ATTEND, KVB_OUT, KVB_GATE_UP, KVB_DOWN, KVB_PHASES };

/* A packed weight [out, in]. `scale` and `bias` have an element for each packed column, padded to whole panels. */
typedef struct {
    const void *panels;
    const float *scale; /* NULL: the panels are of the storage type; else of 8-bit integers that count this much */
    const float *bias;  /* or NULL */
} kvb_matrix;

typedef struct {
    const void *input_norm; /* [hidden] */
    kvb_matrix qkv;         /* [q_size + 2 * kv_size, hidden] */
    const void *q_norm;     /* [head_dim] or NULL */
    const void *k_norm;
    kvb_matrix out; /* [hidden, q_size] */
    const void *post_norm;
    kvb_matrix gate_up; /* [2 * intermediate, hidden], interleaved */
    kvb_matrix down;    /* [hidden, intermediate] */
    int64_t window;     /* tokens that a query sees, 0 for all */
} kvb_layer;

typedef struct {
    int64_t dtype, num_layers, vocab, hidden, intermediate, num_heads, num_kv_heads, head_dim, rotary_half;
    double norm_eps, scale;
    const void *embed;          /* [vocab, hidden], or NULL: rows are read from lm_head, which then is no integers */
    const void *lm_head;        /* packed [vocab, hidden] */
    const float *lm_head_scale; /* as in kvb_matrix */
    const void *norm;           /* [hidden] */
    const float *cos;           /* [positions, rotary_half] */
    const float *sin;
    const kvb_layer *layers;
} kvb_model;

/* One ragged batch, here "sequences" are its pieces: decodes of one query first. See kernels/meta.py. */
typedef struct {
    int64_t num_tokens, num_seqs, num_decodes, table_width, max_context, block_size, pool_layers;
    const int64_t *positions;    /* [num_tokens] */
    const int64_t *slots;        /* [num_tokens] */
    const int32_t *block_tables; /* [num_seqs, table_width] */
    const int32_t *cu_seqlens;   /* [num_seqs + 1] */
    const int32_t *context_lens; /* [num_seqs] */
    void *pool;                  /* [blocks, pool_layers, 2, num_kv_heads, block_size, head_dim] */
    double *seconds;             /* [KVB_PHASES]: wall time of each phase is added here; or NULL */
} kvb_batch;

/* Heads and pool of one attention call outside a model. */
typedef struct {
    int64_t dtype, num_heads, num_kv_heads, head_dim, rotary_half, layer, window;
    double scale;
} kvb_heads;

const char *kvb_describe(void);
int64_t kvb_packed_bytes(int64_t dtype, int64_t out, int64_t in);
/* interleave: weight is gate rows then up rows. */
void kvb_pack(int64_t dtype, const void *weight, void *packed, int64_t out, int64_t in, int64_t interleave);
/* The same of int8 weights that are multiplied with activations of `dtype`. */
int64_t kvb_packed_int8_bytes(int64_t dtype, int64_t out, int64_t in);
void kvb_pack_int8(int64_t dtype, const void *weight, void *packed, int64_t out, int64_t in, int64_t interleave);

int64_t kvb_workspace_bytes(const kvb_model *m, const kvb_batch *b, int64_t threads);
/* token_ids [num_tokens] -> hidden [num_tokens, hidden], normed; writes K and V to the pool. */
void kvb_forward(team *t, const kvb_model *m, const kvb_batch *b, const int64_t *token_ids, void *hidden, void *work);
/* hidden [rows, hidden] -> logits [rows, vocab] float32. */
void kvb_logits(team *t, const kvb_model *m, const void *hidden, int64_t rows, float *logits, void *work);
/* best[i] = the first index of the largest of logits [rows, vocab]; a NaN counts as largest, as in torch. */
void kvb_argmax(const float *logits, int64_t rows, int64_t vocab, int64_t *best);

/* Single operations; x [rows, in] contiguous. */
void kvb_linear(team *t, int64_t dtype, const void *x, const void *packed, const float *bias, void *y, int64_t rows,
                int64_t in, int64_t out, void *work);
void kvb_linear_int8(team *t, int64_t dtype, const void *x, const void *packed, const float *scale, const float *bias, void *y,
                     int64_t rows, int64_t in, int64_t out, void *work);
int64_t kvb_attention_bytes(const kvb_heads *h, const kvb_batch *b, int64_t threads);
/* q [num_tokens, num_heads, head_dim], already rotated -> out, same shape. */
void kvb_attention(team *t, const kvb_heads *h, const kvb_batch *b, const void *q, void *out, void *work);

#endif
