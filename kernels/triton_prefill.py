# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Ragged prefill attention over a paged prefix, in one pass with an online softmax.

A program computes BLOCK_M rows of one sequence and one KV head: BLOCK_M // GROUP tokens times the GROUP query heads
that share its K and V. Key tiles that every row sees run without a mask; only those on the diagonal, or under a window,
pay for one. Key tiles begin at multiples of BLOCK_N, so how a prompt is cut into chunks does not change a row's sums.

Which sequence a program works on is found in cu_seqlens on the device: sequence i owns program numbers from
(cu[i] - cu[0]) // TOKENS + i on, which leaves at most one idle program per sequence and needs nothing from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows and keys of one tile, and how a program is built."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, group: int, head_dim: int, dtype: torch.dtype) -> PrefillTile:
        rows = triton.next_power_of_2(group)
        if dtype == torch.float32:  # no tensor cores: operands sit in registers, and larger tiles spill
            return cls(max(rows, 32), 16, 8, 2)
        if head_dim > 128:
            return cls(max(rows, 64), 64, 8, 2)
        return cls(max(rows, 128), 64, 8, 3)


@triton.jit
def _find_sequence(cu_ptr, num_seqs, program, TOKENS: tl.constexpr):
    """The last sequence whose first program is not past `program`."""
    base = tl.load(cu_ptr)
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begins = (tl.load(cu_ptr + middle) - base) // TOKENS + middle
        if begins <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend_tiles(
    acc, top, total, q, position, k_ptr, v_ptr, table_ptr, low, high, context_len, block_stride, window, scale_log2,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys low .. high, a multiple of BLOCK_N on, into the running output, maximum and sum."""
    dim, lane = tl.arange(0, DIM_PAD), tl.arange(0, BLOCK_N)
    dim_ok = dim < HEAD_DIM
    for start in range(low, high, BLOCK_N):
        key = start + lane
        key_ok = key < context_len
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key_ok, other=0).to(tl.int64)
        at = block * block_stride + (key % BLOCK_SIZE) * HEAD_DIM
        if MASKED:
            k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=key_ok[None, :] & dim_ok[:, None], other=0.0)
            v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=key_ok[:, None] & dim_ok[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=dim_ok[:, None], other=0.0)
            v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=dim_ok[None, :], other=0.0)
        k, v = k.to(q.dtype), v.to(q.dtype)  # 8-bit floats widen after the load
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            # A row may see nothing of a tile that lies before its window; -inf minus -inf would be NaN.
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            pivot = new_top
        weights = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def prefill_kernel(
    q_ptr,  # [num_tokens, heads, head_dim], head_dim contiguous
    layer_ptr,  # the pool, from the layer's first element in block 0
    tables_ptr,  # [num_seqs, max_blocks] int32
    cu_ptr,  # [num_seqs + 1] int32
    lens_ptr,  # [num_seqs] int32
    out_ptr,  # [num_tokens, heads, head_dim] contiguous
    q_token_stride,
    q_head_stride,
    block_stride,
    table_stride,
    num_seqs,
    window,
    scale_log2,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    # The last tiles of a prompt see most keys; they start first so that short ones fill the end.
    program, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    seq = _find_sequence(cu_ptr, num_seqs, program, TOKENS)
    base = tl.load(cu_ptr)
    begin = tl.load(cu_ptr + seq) - base
    num_queries = tl.load(cu_ptr + seq + 1) - base - begin
    first_token = (program - (begin // TOKENS + seq)) * TOKENS
    if first_token >= num_queries:
        return
    context_len = tl.load(lens_ptr + seq)
    row, dim = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD)
    token, head = first_token + row // GROUP, kv_head * GROUP + row % GROUP
    mask = ((row < TOKENS * GROUP) & (token < num_queries))[:, None] & (dim < HEAD_DIM)[None, :]
    at = (begin + token).to(tl.int64)
    q = tl.load(q_ptr + (at * q_token_stride + head * q_head_stride)[:, None] + dim[None, :], mask=mask, other=0.0)
    k_ptr = layer_ptr + kv_head * BLOCK_SIZE * HEAD_DIM
    v_ptr = k_ptr + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    prefix = context_len - num_queries
    position = prefix + token
    high = prefix + tl.minimum(first_token + TOKENS, num_queries)
    if HAS_WINDOW:
        low = tl.maximum(prefix + first_token + 1 - window, 0) // BLOCK_N * BLOCK_N
        middle = low
    else:
        low = 0
        middle = (prefix + first_token + 1) // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    if not HAS_WINDOW:
        acc, top, total = _attend_tiles(
            acc, top, total, q, position, k_ptr, v_ptr, table_ptr, low, middle, context_len, block_stride, window,
            scale_log2, False, HAS_WINDOW, HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
    acc, top, total = _attend_tiles(
        acc, top, total, q, position, k_ptr, v_ptr, table_ptr, middle, high, context_len, block_stride, window,
        scale_log2, True, HAS_WINDOW, HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip
    out_at = out_ptr + ((at * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def prefill_into(
    out: torch.Tensor,
    q: torch.Tensor,
    layer_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> None:
    """q [num_tokens, heads, head_dim], rows counted from cu_seqlens_q[0], to `out` of the same shape, contiguous.

    layer_cache [num_blocks, 2, kv_heads, block_size, head_dim].
    """
    num_tokens, heads, head_dim = q.shape
    num_seqs = block_tables.shape[0]
    if not num_tokens:
        return
    _, _, kv_heads, block_size, _ = layer_cache.shape
    group = heads // kv_heads
    tile = PrefillTile.of(group, head_dim, q.dtype)
    window = sliding_window or 0
    grid = (num_tokens // (tile.block_m // group) + num_seqs, kv_heads)
    prefill_kernel[grid](
        q, layer_cache, block_tables, cu_seqlens_q, context_lens, out,
        q.stride(0), q.stride(1), layer_cache.stride(0), block_tables.stride(0), num_seqs, window, scale * LOG2_E,
        HAS_WINDOW=window > 0, GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
