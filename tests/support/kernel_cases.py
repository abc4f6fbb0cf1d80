"""Random ragged batches over a poisoned pool, and what attention over them must give, computed in float64 by loops.

The oracle keeps each sequence's K and V as dense tensors and never reads the pool, a block table or a slot, so it
shares no indexing with the code under test. Every slot that nobody wrote holds NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbaton.kernels.meta import AttentionMeta, build_attention_meta

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a case is made of; `windows` None is full attention."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    rotary_dim: int | None = None
    num_layers: int = 3
    layer: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one layer's step. `kv_cache` holds the prefixes in `layer` and NaN everywhere else."""

    shape: Shape
    meta: AttentionMeta
    kv_cache: torch.Tensor  # [num_blocks, num_layers, 2, kv_heads, block_size, head_dim]
    q: torch.Tensor  # [num_tokens, heads, head_dim], before rope
    k: torch.Tensor  # [num_tokens, kv_heads, head_dim], before rope
    v: torch.Tensor  # [num_tokens, kv_heads, head_dim]
    cos: torch.Tensor  # [max_position, rotary_dim / 2] float32
    sin: torch.Tensor  # [max_position, rotary_dim / 2] float32
    prefix_k: tuple[torch.Tensor, ...]  # a sequence: [prefix tokens, kv_heads, head_dim], after rope
    prefix_v: tuple[torch.Tensor, ...]
    block_tables: tuple[tuple[int, ...], ...]

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5


def leading_ones(query_lens: tuple[int, ...]) -> int:
    """Pieces of one token before the first longer one: what goes as decodes unless a test says otherwise."""
    return next((i for i, queries in enumerate(query_lens) if queries > 1), len(query_lens))


def make_case(shape: Shape, seed: int, device: torch.device = CPU) -> Case:
    """Blocks of all sequences are shuffled over the pool; block 0, the padding id of block tables, stays poisoned."""
    g = torch.Generator().manual_seed(seed)
    tables = _shuffled_tables(shape, g)
    num_blocks = 2 + sum(map(len, tables))
    pool = torch.full(
        (num_blocks, shape.num_layers, 2, shape.kv_heads, shape.block_size, shape.head_dim),
        float("nan"),
        dtype=shape.dtype,
    )
    prefixes = [c - q for q, c in zip(shape.query_lens, shape.context_lens, strict=True)]
    ks = tuple(_randn(g, shape, n, shape.kv_heads) for n in prefixes)
    vs = tuple(_randn(g, shape, n, shape.kv_heads) for n in prefixes)
    for table, k, v in zip(tables, ks, vs, strict=True):
        for position in range(k.shape[0]):
            block, offset = table[position // shape.block_size], position % shape.block_size
            pool[block, shape.layer, 0, :, offset] = k[position]
            pool[block, shape.layer, 1, :, offset] = v[position]
    total = sum(shape.query_lens)
    angles = torch.rand(max(shape.context_lens), (shape.rotary_dim or shape.head_dim) // 2, generator=g) * 6.3
    return Case(
        shape=shape,
        meta=build_attention_meta(
            shape.query_lens, shape.context_lens, tables, shape.block_size, device, leading_ones(shape.query_lens)
        ),
        kv_cache=pool.to(device),
        q=_randn(g, shape, total, shape.heads).to(device),
        k=_randn(g, shape, total, shape.kv_heads).to(device),
        v=_randn(g, shape, total, shape.kv_heads).to(device),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        prefix_k=ks,
        prefix_v=vs,
        block_tables=tables,
    )


def expected_rope(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Rotation as a complex product in float64: dims j and j + rotary_dim / 2 are one complex number."""
    half = case.cos.shape[1]
    at = case.meta.positions.cpu()
    turn = torch.complex(case.cos.cpu().double(), case.sin.cpu().double())[at].unsqueeze(1)
    wide = x.cpu().double()
    turned = torch.complex(wide[..., :half], wide[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), dim=-1)


def expected_attention(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k, v [num_tokens, heads, head_dim] of the step, k after rope -> float64 [num_tokens, heads, head_dim]."""
    shape, row = case.shape, 0
    q, k, v = q.cpu().double(), k.cpu().double(), v.cpu().double()
    out = torch.empty_like(q)
    for i, (queries, context) in enumerate(zip(shape.query_lens, shape.context_lens, strict=True)):
        keys = torch.cat((case.prefix_k[i].double(), k[row : row + queries]))
        values = torch.cat((case.prefix_v[i].double(), v[row : row + queries]))
        for n in range(queries):
            position = context - queries + n
            first = 0 if shape.window is None else max(0, position - shape.window + 1)
            for h in range(shape.heads):
                kv = h // (shape.heads // shape.kv_heads)
                weights = (keys[first : position + 1, kv] @ q[row + n, h] * case.scale).softmax(0)
                out[row + n, h] = weights @ values[first : position + 1, kv]
        row += queries
    return out


def written_slots(case: Case) -> set[tuple[int, int]]:
    """(block, offset) of every token of every sequence, the step's own included."""
    size = case.shape.block_size
    return {
        (table[p // size], p % size)
        for table, context in zip(case.block_tables, case.shape.context_lens, strict=True)
        for p in range(context)
    }


def _shuffled_tables(shape: Shape, g: torch.Generator) -> tuple[tuple[int, ...], ...]:
    counts = [-(-c // shape.block_size) for c in shape.context_lens]
    ids = iter((torch.randperm(sum(counts), generator=g) + 1).tolist())
    return tuple(tuple(next(ids) for _ in range(n)) for n in counts)


def _randn(g: torch.Generator, shape: Shape, tokens: int, heads: int) -> torch.Tensor:
    return torch.randn(tokens, heads, shape.head_dim, generator=g).to(shape.dtype)
