# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Rotary embedding of q and k fused with the write of k and v to the paged pool: one read and one write of each.

Programs of one token: ceil(heads / HEADS) tiles of q, then ceil(kv_heads / HEADS) tiles that turn k and copy v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvbaton.kernels.meta import AttentionMeta

HEADS = 8


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x in the pool's dtype; 8-bit floats saturate."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    return x.to(dtype)


@triton.jit
def _turn(src, dst, cos, sin, heads, HALF, head_dim, HALF_PAD: tl.constexpr, TAIL_PAD: tl.constexpr, mask):
    """Rotate rows at pointers `src` [HEADS, 1] to `dst`, and copy the dims past 2 * HALF."""
    dim = tl.arange(0, HALF_PAD)[None, :]
    inside = mask & (dim < HALF)
    first = tl.load(src + dim, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(src + HALF + dim, mask=inside, other=0.0).to(tl.float32)
    own: tl.constexpr = src.dtype.element_ty
    tl.store(dst + dim, _stored((first * cos - second * sin).to(own), dst.dtype.element_ty), mask=inside)
    tl.store(dst + HALF + dim, _stored((second * cos + first * sin).to(own), dst.dtype.element_ty), mask=inside)
    if TAIL_PAD > 0:
        tail = 2 * HALF + tl.arange(0, TAIL_PAD)[None, :]
        rest = mask & (tail < head_dim)
        kept = tl.load(src + tail, mask=rest, other=0.0)
        tl.store(dst + tail, _stored(kept, dst.dtype.element_ty), mask=rest)


@triton.jit
def rope_write_kernel(
    q_ptr,  # [num_tokens, heads, head_dim], head_dim contiguous; likewise k and v
    k_ptr,
    v_ptr,
    cos_ptr,  # [max_position, half] contiguous
    sin_ptr,
    positions_ptr,  # [num_tokens] int64
    slots_ptr,  # [num_tokens] int64
    out_ptr,  # [num_tokens, heads, head_dim] contiguous
    layer_ptr,  # the pool, from the layer's first element in block 0
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    block_stride,
    heads,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    half = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    q_tiles = tl.cdiv(heads, HEADS_TILE)
    lane = tl.arange(0, HEADS_TILE)[:, None]
    if tile < q_tiles:
        head = tile * HEADS_TILE + lane
        src = q_ptr + token * q_token_stride + head * q_head_stride
        dst = out_ptr + (token * heads + head) * HEAD_DIM
        _turn(src, dst, cos, sin, heads, HALF, HEAD_DIM, HALF_PAD, TAIL_PAD, head < heads)
    else:
        head = (tile - q_tiles) * HEADS_TILE + lane
        slot = tl.load(slots_ptr + token)
        block = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
        kv_dst = layer_ptr + block + head * BLOCK_SIZE * HEAD_DIM
        mask = head < KV_HEADS
        src = k_ptr + token * k_token_stride + head * k_head_stride
        _turn(src, kv_dst, cos, sin, KV_HEADS, HALF, HEAD_DIM, HALF_PAD, TAIL_PAD, mask)
        dim = tl.arange(0, DIM_PAD)[None, :]
        inside = mask & (dim < HEAD_DIM)
        value = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + dim, mask=inside, other=0.0)
        v_dst = kv_dst + KV_HEADS * BLOCK_SIZE * HEAD_DIM + dim
        tl.store(v_dst, _stored(value, v_dst.dtype.element_ty), mask=inside)


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    meta: AttentionMeta,
) -> torch.Tensor:
    """Rotated q [num_tokens, heads, head_dim]; rotated k and v go to the slots of `meta`."""
    tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kv_heads, block_size, half = k.shape[1], kv_cache.shape[4], cos.shape[1]
    tail = head_dim - 2 * half
    grid = (tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))
    rope_write_kernel[grid](
        q, k, v, cos, sin, meta.positions, meta.slot_mapping, out, kv_cache[0, layer],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), kv_cache.stride(0), heads,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, BLOCK_SIZE=block_size, HEADS_TILE=HEADS,
        HALF_PAD=triton.next_power_of_2(half), TAIL_PAD=triton.next_power_of_2(tail) if tail else 0,
        DIM_PAD=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return out
