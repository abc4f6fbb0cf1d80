# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Copies out of the pool: whole blocks to other blocks, and contexts to one row a token.

    copy_blocks      grid (block, CHUNK elements)
    gather_context   grid (TOKENS tokens of a context, sequence, kv head)

A block is one contiguous range. Contexts as rows, sequence after sequence, are what attention that knows no block
tables reads; there stored 8-bit floats become the dtype of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvbaton.kernels.quantization import storage

CHUNK = 4096
TOKENS = 32


@triton.jit
def copy_blocks_kernel(
    src_ptr,  # [blocks, block_elements] contiguous; so is dst, here the same pool
    dst_ptr,
    src_ids_ptr,  # [n]
    dst_ids_ptr,  # [n]
    block_elements,
    CHUNK: tl.constexpr,
):
    index = tl.program_id(0)
    src = tl.load(src_ids_ptr + index).to(tl.int64)
    dst = tl.load(dst_ids_ptr + index).to(tl.int64)
    offset = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offset < block_elements
    value = tl.load(src_ptr + src * block_elements + offset, mask=mask)
    tl.store(dst_ptr + dst * block_elements + offset, value, mask=mask)


@triton.jit
def gather_context_kernel(
    layer_ptr,  # the pool, from the layer's first element in block 0
    tables_ptr,  # [num_seqs, max_blocks] int32
    cu_ptr,  # [num_seqs + 1] int32: where each context begins among the rows
    k_ptr,  # [rows, KV_HEADS, HEAD_DIM] contiguous
    v_ptr,
    block_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    seq, head = tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_ptr + seq)
    context_len = tl.load(cu_ptr + seq + 1) - begin
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(0) * TOKENS >= context_len:
        return
    token_ok, dim = token < context_len, tl.arange(0, DIM_PAD)
    mask = token_ok[:, None] & (dim < HEAD_DIM)[None, :]
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    block = tl.load(table_ptr + token // BLOCK_SIZE, mask=token_ok, other=0).to(tl.int64)
    own = block * block_stride + (token % BLOCK_SIZE) * HEAD_DIM + head * BLOCK_SIZE * HEAD_DIM
    src = layer_ptr + own[:, None] + dim[None, :]
    dst = ((begin + token).to(tl.int64) * KV_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    k = tl.load(src, mask=mask, other=0.0)
    v = tl.load(src + KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=mask, other=0.0)
    tl.store(k_ptr + dst, k.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + dst, v.to(v_ptr.dtype.element_ty), mask=mask)


def copy_blocks(kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
    """Block src_ids[i] to dst_ids[i]; no destination occurs twice or among the sources."""
    if not len(src_ids):
        return
    pool = storage(kv_cache)
    elements = pool.stride(0)
    copy_blocks_kernel[(len(src_ids), triton.cdiv(elements, CHUNK))](
        pool, pool, src_ids, dst_ids, elements, CHUNK=CHUNK, num_warps=8
    )


def gather_context(
    layer_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rows: int,
    longest: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """layer_cache [num_blocks, 2, kv_heads, block_size, head_dim] -> K and V, [rows, kv_heads, head_dim] in `dtype`.

    block_tables [num_seqs, max_blocks] int32; cu_seqlens [num_seqs + 1] int32 from 0 to `rows`, no context longer than
    `longest`.
    """
    _, _, kv_heads, block_size, head_dim = layer_cache.shape
    k, v = (torch.empty((rows, kv_heads, head_dim), dtype=dtype, device=layer_cache.device) for _ in range(2))
    if rows:
        gather_context_kernel[(triton.cdiv(longest, TOKENS), block_tables.shape[0], kv_heads)](
            layer_cache, block_tables, cu_seqlens, k, v, layer_cache.stride(0), block_tables.stride(0),
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM_PAD=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
            TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return k, v
