# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Paged decode attention in two stages: splits of the context in parallel, then one weighted sum a head.

    grid (sequence, kv head, split) -> partial output, running maximum and sum, float32
    grid (sequence, head)           -> output

The query heads of one KV head are the rows of one tile, so a K and V tile is read once for all of them. How a row's
context is split depends on its own length alone, never on the batch: its result is the same alone and in company.
The grid depends on the width of the block table only, so a captured graph stays valid while contexts grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MIN_SPLIT = 256
MAX_SPLITS = 64
REDUCE_SPLITS = 16
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Rows and keys of one tile, and how a program is built."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, group: int, head_dim: int, dtype: torch.dtype) -> DecodeTile:
        rows = max(16, triton.next_power_of_2(group))
        if dtype == torch.float32:  # no tensor cores: operands sit in registers, and larger tiles spill
            return cls(rows, 32 if rows == 16 else 16, 8, 2)
        wide = head_dim > 128
        return cls(rows, 32 if wide else 64, 4, 2 if wide else 3)


@triton.jit
def _split_tokens(span, MIN: tl.constexpr, MAX: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens per split: MIN, or more where the span would need over MAX splits; a multiple of BLOCK_N."""
    return tl.maximum(MIN, tl.cdiv(tl.cdiv(span, MAX), BLOCK_N) * BLOCK_N)


@triton.jit
def _first_key(context_len, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile: where the window begins, rounded down to a tile."""
    if HAS_WINDOW:
        first = tl.maximum(context_len - window, 0) // BLOCK_N * BLOCK_N
    else:
        first = 0
    return first


@triton.jit
def decode_split_kernel(
    q_ptr,  # [num_seqs, heads, head_dim], head_dim contiguous
    layer_ptr,  # the pool, from the layer's first element in block 0
    tables_ptr,  # [num_seqs, max_blocks] int32
    lens_ptr,  # [num_seqs] int32
    part_ptr,  # [num_seqs, heads, num_splits, head_dim] float32
    stats_ptr,  # [num_seqs, heads, num_splits, 2] float32: maximum (base 2) and sum
    out_ptr,  # [num_seqs, heads, head_dim] contiguous
    q_token_stride,
    q_head_stride,
    block_stride,
    table_stride,
    window,
    scale_log2,
    num_splits,
    SINGLE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(lens_ptr + seq)
    first = _first_key(context_len, window, HAS_WINDOW, BLOCK_N)
    per_split = _split_tokens(context_len - first, MIN, MAX, BLOCK_N)
    low = first + split * per_split
    high = tl.minimum(low + per_split, context_len)
    if low >= high:
        return
    row, dim, lane = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + row
    dim_ok = dim < HEAD_DIM
    q_mask = (row < GROUP)[:, None] & dim_ok[None, :]
    q_at = q_ptr + seq * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    k_ptr = layer_ptr + kv_head * BLOCK_SIZE * HEAD_DIM
    v_ptr = k_ptr + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for start in range(low, high, BLOCK_N):
        key = start + lane
        key_ok = key < high
        block = tl.load(tables_ptr + seq * table_stride + key // BLOCK_SIZE, mask=key_ok, other=0).to(tl.int64)
        at = block * block_stride + (key % BLOCK_SIZE) * HEAD_DIM
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=key_ok[None, :] & dim_ok[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=key_ok[:, None] & dim_ok[None, :], other=0.0)
        seen = key_ok & (key >= context_len - window) if HAS_WINDOW else key_ok
        k, v = k.to(q.dtype), v.to(q.dtype)  # 8-bit floats widen after the load
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    if SINGLE:
        out_at = out_ptr + (seq * KV_HEADS * GROUP + head[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        slot = (seq * KV_HEADS * GROUP + head) * num_splits + split
        tl.store(part_ptr + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=q_mask)
        tl.store(stats_ptr + slot * 2, top, mask=row < GROUP)
        tl.store(stats_ptr + slot * 2 + 1, total, mask=row < GROUP)


@triton.jit
def decode_reduce_kernel(
    part_ptr,  # [num_seqs, heads, num_splits, head_dim] float32
    stats_ptr,  # [num_seqs, heads, num_splits, 2] float32
    lens_ptr,  # [num_seqs] int32
    out_ptr,  # [num_seqs, heads, head_dim] contiguous
    window,
    num_splits,
    heads,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
    SPLITS: tl.constexpr,
):
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    context_len = tl.load(lens_ptr + seq)
    span = context_len - _first_key(context_len, window, HAS_WINDOW, BLOCK_N)
    used = tl.cdiv(span, _split_tokens(span, MIN, MAX, BLOCK_N))
    dim, lane = tl.arange(0, DIM_PAD), tl.arange(0, SPLITS)
    dim_ok = dim < HEAD_DIM
    base = (seq * heads + head) * num_splits
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, used, SPLITS):
        split = start + lane
        ok = split < used
        part_top = tl.load(stats_ptr + (base + split) * 2, mask=ok, other=float("-inf"))
        part_total = tl.load(stats_ptr + (base + split) * 2 + 1, mask=ok, other=0.0)
        at = part_ptr + (base + split)[:, None] * HEAD_DIM + dim[None, :]
        part = tl.load(at, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        weights = tl.exp2(part_top - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(part_total * weights, axis=0)
        acc = acc * shrink + tl.sum(part * weights[:, None], axis=0)
        top = new_top
    out_at = out_ptr + (seq * heads + head) * HEAD_DIM + dim
    tl.store(out_at, (acc / total).to(out_ptr.dtype.element_ty), mask=dim_ok)


def decode_into(
    out: torch.Tensor,
    q: torch.Tensor,
    layer_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> None:
    """q [num_seqs, heads, head_dim], one query a sequence, to `out` of the same shape, contiguous.

    layer_cache [num_blocks, 2, kv_heads, block_size, head_dim].
    """
    num_seqs, heads, head_dim = q.shape
    if not num_seqs:
        return
    _, _, kv_heads, block_size, _ = layer_cache.shape
    tile = DecodeTile.of(heads // kv_heads, head_dim, q.dtype)
    num_splits = _num_splits(block_tables.shape[1] * block_size, sliding_window, tile.block_n)
    part, stats = (
        torch.empty((num_seqs, heads, num_splits, n), dtype=torch.float32, device=q.device) for n in (head_dim, 2)
    )
    window, dim_pad = sliding_window or 0, triton.next_power_of_2(head_dim)
    decode_split_kernel[(num_seqs, kv_heads, num_splits)](
        q, layer_cache, block_tables, context_lens, part, stats, out,
        q.stride(0), q.stride(1), layer_cache.stride(0), block_tables.stride(0), window, scale * LOG2_E, num_splits,
        SINGLE=num_splits == 1, HAS_WINDOW=window > 0, GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM_PAD=dim_pad, BLOCK_SIZE=block_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MIN=MIN_SPLIT,
        MAX=MAX_SPLITS, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if num_splits > 1:
        decode_reduce_kernel[(num_seqs, heads)](
            part, stats, context_lens, out, window, num_splits, heads,
            HAS_WINDOW=window > 0, HEAD_DIM=head_dim, DIM_PAD=dim_pad, BLOCK_N=tile.block_n, MIN=MIN_SPLIT,
            MAX=MAX_SPLITS, SPLITS=REDUCE_SPLITS, num_warps=4,
        )  # fmt: skip


def _num_splits(max_tokens: int, sliding_window: int | None, block_n: int) -> int:
    """Splits that the longest row can need; a window may begin in the middle of a tile."""
    span = max_tokens if sliding_window is None else min(max_tokens, sliding_window + block_n)
    return max(1, min(MAX_SPLITS, -(-span // MIN_SPLIT)))
