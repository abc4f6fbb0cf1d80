"""Inputs of one layer's step and what it must give, in float64: dense tensors a sequence, no block table, no slot.

Blocks of all sequences are shuffled over a pool of which every slot that nobody wrote holds NaN, so a read of another
slot shows. K and V are rounded to the pool's dtype first: what is compared is arithmetic and indexing, not rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbaton.engine.config import GPU_BLOCK_SIZE
from kvbaton.kernels.meta import AttentionMeta, build_attention_meta
from kvbaton.kernels.quantization import storage, to_kv

LAYERS, LAYER = 2, 1


@dataclass(frozen=True, slots=True)
class Shape:
    """Query and context lengths a sequence, single queries first."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = GPU_BLOCK_SIZE
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None

    @property
    def pool_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


@dataclass(frozen=True, slots=True)
class Step:
    """`keys` and `values` a sequence: [context, kv_heads, head_dim] in float64, as the pool holds them."""

    shape: Shape
    meta: AttentionMeta
    pool: torch.Tensor  # [num_blocks, LAYERS, 2, kv_heads, block_size, head_dim]
    q: torch.Tensor  # [num_tokens, heads, head_dim]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def make_step(shape: Shape, generator: torch.Generator) -> Step:
    device = generator.device
    counts = [-(-context // shape.block_size) for context in shape.contexts]
    ids = (torch.randperm(sum(counts), generator=generator, device=device) + 1).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    block = (LAYERS, 2, shape.kv_heads, shape.block_size, shape.head_dim)
    pool = torch.full((sum(counts) + 2, *block), torch.nan, device=device).to(shape.pool_dtype)
    pairs = [
        tuple(normal((context, shape.kv_heads, shape.head_dim), shape.dtype, generator) for _ in range(2))
        for context in shape.contexts
    ]
    for table, pair in zip(tables, pairs, strict=True):
        for which, x in enumerate(pair):
            fill(pool, table, which, to_kv(x, shape.pool_dtype))
    wide = [tuple(to_kv(x, shape.pool_dtype).double() for x in pair) for pair in pairs]
    decodes = next((i for i, queries in enumerate(shape.queries) if queries > 1), len(shape.queries))
    return Step(
        shape=shape,
        meta=build_attention_meta(shape.queries, shape.contexts, tables, shape.block_size, device, decodes),
        pool=pool,
        q=normal((sum(shape.queries), shape.heads, shape.head_dim), shape.dtype, generator),
        keys=tuple(k for k, _ in wide),
        values=tuple(v for _, v in wide),
    )


def fill(pool: torch.Tensor, table: list[int], which: int, x: torch.Tensor) -> None:
    """x [tokens, kv_heads, head_dim] to a sequence's blocks, in order; the last block's rest stays as it is."""
    size = pool.shape[4]
    for i, block in enumerate(table):
        part = x[i * size : (i + 1) * size].transpose(0, 1)  # [kv_heads, tokens, head_dim]
        storage(pool)[block, LAYER, which, :, : part.shape[1]] = storage(part.contiguous())


def attention(step: Step) -> torch.Tensor:
    """float64 [num_tokens, heads, head_dim]."""
    shape, parts, row = step.shape, [], 0
    group = shape.heads // shape.kv_heads
    for queries, context, k, v in zip(shape.queries, shape.contexts, step.keys, step.values, strict=True):
        q = step.q[row : row + queries].double()
        row += queries
        position = torch.arange(context - queries, context, device=q.device).unsqueeze(1)
        key = torch.arange(context, device=q.device)
        hidden = key > position
        if shape.window is not None:
            hidden |= key <= position - shape.window
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * shape.head_dim**-0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(parts)


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] turned as complex numbers (dims j and j + half), float64; cos, sin [tokens, half]."""
    half = cos.shape[1]
    wide = x.double()
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(1)
    turned = torch.complex(wide[..., :half], wide[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), dim=-1)
