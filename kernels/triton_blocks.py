# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Copies of whole KV blocks: pool to staging, staging to pool, pool to pool. A block is one contiguous range."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvbaton.kernels.kv_dtype import storage

CHUNK = 4096


@triton.jit
def copy_blocks_kernel(
    src_ptr,
    dst_ptr,
    src_ids_ptr,  # [n], read where SRC_IDS; else block i is the i-th
    dst_ids_ptr,  # [n], read where DST_IDS
    block_elements,
    SRC_IDS: tl.constexpr,
    DST_IDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index = tl.program_id(0)
    src = index.to(tl.int64)
    dst = index.to(tl.int64)
    if SRC_IDS:
        src = tl.load(src_ids_ptr + index).to(tl.int64)
    if DST_IDS:
        dst = tl.load(dst_ids_ptr + index).to(tl.int64)
    offset = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offset < block_elements
    value = tl.load(src_ptr + src * block_elements + offset, mask=mask)
    tl.store(dst_ptr + dst * block_elements + offset, value, mask=mask)


def gather_blocks(kv_cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, num_layers, 2, num_kv_heads, block_size, head_dim], a copy."""
    staging = torch.empty((len(block_ids), *kv_cache.shape[1:]), dtype=kv_cache.dtype, device=kv_cache.device)
    _copy(kv_cache, staging, block_ids, None)
    return staging


def scatter_blocks(staging: torch.Tensor, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    """staging [n, ...], contiguous, to the distinct blocks `block_ids [n]`."""
    _copy(staging, kv_cache, None, block_ids)


def copy_blocks(kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
    """Block src_ids[i] to dst_ids[i]; no destination occurs twice or among the sources."""
    _copy(kv_cache, kv_cache, src_ids, dst_ids)


def _copy(src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor | None, dst_ids: torch.Tensor | None) -> None:
    ids = src_ids if src_ids is not None else dst_ids
    if ids is None or not len(ids):
        return
    src, dst = storage(src), storage(dst)
    elements = src.stride(0)
    copy_blocks_kernel[(len(ids), triton.cdiv(elements, CHUNK))](
        src, dst, ids if src_ids is None else src_ids, ids if dst_ids is None else dst_ids, elements,
        SRC_IDS=src_ids is not None, DST_IDS=dst_ids is not None, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
