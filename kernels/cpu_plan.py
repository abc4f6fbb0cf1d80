"""What one step on the CPU computes once for all layers: how its attention runs, rotary factors, rows to write.

A *tile* is the [block_size, head_dim] of one (block, layer, K or V, head): the largest contiguous piece of the pool
that one head needs. Tile numbers here are those of layer 0; a layer's tiles lie at a constant distance.

Decode rows are grouped by `bucket` of their own length and nothing else, so that the shape in which a row is computed
does not depend on its batch and its result is the same to the last bit alone and in company.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.kernels.meta import AttentionMeta

Ids = npt.NDArray[np.int64]

# Measured on two AVX-512 cores: more queries per call waste work above the diagonal, fewer repeat its fixed cost.
QUERY_TILE = 64
# A decode call gathers at most this much K and V, which keeps it inside a core's cache.
GATHER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class PoolShape:
    """The geometry of a KV pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, kv_cache: torch.Tensor) -> PoolShape:
        _, layers, _, heads, block_size, head_dim = kv_cache.shape
        return cls(layers, heads, block_size, head_dim, kv_cache.dtype)

    def tiles(self, blocks: Ids) -> Ids:  # [rows, width] -> [2, rows, num_kv_heads, width]
        """Layer 0's tile numbers of K and V of each block."""
        kv = np.arange(2)[:, None, None, None]
        head = np.arange(self.num_kv_heads)[:, None]
        return ((blocks[:, None, :] * self.num_layers * 2) + kv) * self.num_kv_heads + head

    def layer_tiles(self, kv_cache: torch.Tensor, layer: int) -> torch.Tensor:
        """The pool as [num_tiles, block_size * head_dim], starting where `tiles` of this layer count from."""
        return kv_cache.view(-1, self.block_size * self.head_dim)[layer * 2 * self.num_kv_heads :]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of one bucket."""

    rows: torch.Tensor  # [rows] int64
    tiles: torch.Tensor  # [2 * rows * num_kv_heads * width] int64
    bias: torch.Tensor  # [rows, 1, 1, width * block_size]: 0 where a key is seen, -inf elsewhere
    holes: torch.Tensor  # [n] int64: gathered slots that nobody wrote; they may hold NaN, which a bias does not hide


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence's chunk: queries `row .. row + num_queries` over keys from `first_key` (a block's start) on."""

    row: int
    num_queries: int
    first_key: int
    context_len: int
    tiles: torch.Tensor  # [2 * num_kv_heads * width] int64


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """`causal_bias [QUERY_TILE, n]` is right-aligned: its last m rows and k columns are the bias of m queries over
    k keys that end together."""

    shape: PoolShape
    sliding_window: int | None
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]
    causal_bias: torch.Tensor

    def first_seen(self, position: int) -> int:
        """The first key that a query at `position` sees."""
        return 0 if self.sliding_window is None else max(0, position + 1 - self.sliding_window)


def plan_attention(meta: AttentionMeta, shape: PoolShape, sliding_window: int | None) -> CpuPlan:
    """All index arithmetic of one step, for the layers that share `sliding_window`."""
    prefills = tuple(_prefill_spans(meta, shape, sliding_window))
    longest = max((min(s.context_len, (sliding_window or s.context_len) + QUERY_TILE) for s in prefills), default=0)
    return CpuPlan(
        shape,
        sliding_window,
        tuple(_decode_groups(meta, shape, sliding_window)),
        prefills,
        _causal_bias(longest, sliding_window, shape.dtype),
    )


def bucket(num_blocks: Ids) -> Ids:
    """Blocks to compute with, a function of a row's own length: powers of two to 16, then four steps per octave."""
    power = 1 << np.ceil(np.log2(np.maximum(num_blocks, 1))).astype(np.int64)
    step = np.maximum(power // 8, 1)
    fine = -(-num_blocks // step) * step
    return np.where(num_blocks <= 16, power, fine)


def _decode_groups(meta: AttentionMeta, shape: PoolShape, sliding_window: int | None) -> Iterator[DecodeGroup]:
    size = shape.block_size
    lens = np.asarray(meta.context_lens_host[: meta.num_decodes], dtype=np.int64)
    seen_from = np.maximum(lens - sliding_window, 0) if sliding_window is not None else np.zeros_like(lens)
    first_block = seen_from // size
    widths = bucket(-(-lens // size) - first_block)
    for width in np.unique(widths).tolist():
        rows = np.flatnonzero(widths == width)
        row_bytes = 2 * shape.num_kv_heads * width * size * shape.head_dim * shape.dtype.itemsize
        step = max(1, GATHER_BYTES // row_bytes)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            yield _decode_group(meta, shape, part, lens[part], seen_from[part], width)


def _decode_group(
    meta: AttentionMeta, shape: PoolShape, rows: Ids, lens: Ids, seen_from: Ids, width: int
) -> DecodeGroup:
    """Columns past a row's last block repeat its first one: finite numbers of its own, hidden by the bias."""
    size = shape.block_size
    first = seen_from // size
    columns = first[:, None] + np.arange(width)
    columns = np.where(columns * size < lens[:, None], columns, first[:, None])
    blocks = meta.block_tables.numpy()[rows[:, None], columns].astype(np.int64)
    key = first[:, None] * size + np.arange(width * size)
    bias = torch.from_numpy(np.where((key < lens[:, None]) & (key >= seen_from[:, None]), np.float32(0), -np.inf))
    return DecodeGroup(
        torch.from_numpy(rows),
        torch.from_numpy(shape.tiles(blocks).ravel()),
        bias.to(shape.dtype)[:, None, None, :],
        torch.from_numpy(_holes(lens - first * size, shape, width)),
    )


def _holes(lens: Ids, shape: PoolShape, width: int) -> Ids:
    """Unwritten slots in the last block of each row, as indices into the gathered [2, rows, num_kv_heads, slots]."""
    slots = width * shape.block_size
    counts = -lens % shape.block_size
    row = np.repeat(np.arange(len(lens)), counts)
    position = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + lens[row]
    plane = np.arange(2)[:, None, None] * len(lens) + row[:, None]
    head = plane * shape.num_kv_heads + np.arange(shape.num_kv_heads)
    flat: Ids = (head * slots + position[:, None]).ravel()
    return flat


def _prefill_spans(meta: AttentionMeta, shape: PoolShape, sliding_window: int | None) -> Iterator[PrefillSpan]:
    tables, size, row = meta.block_tables.numpy(), shape.block_size, meta.num_decodes
    for i in range(meta.num_decodes, meta.num_seqs):
        num_queries, context_len = meta.query_lens[i], meta.context_lens_host[i]
        seen_from = 0 if sliding_window is None else max(0, context_len - num_queries + 1 - sliding_window)
        first_block = seen_from // size
        blocks = tables[i : i + 1, first_block : -(-context_len // size)].astype(np.int64)
        tiles = torch.from_numpy(shape.tiles(blocks).ravel())
        yield PrefillSpan(row, num_queries, first_block * size, context_len, tiles)
        row += num_queries


def _causal_bias(num_keys: int, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    query = torch.arange(num_keys - QUERY_TILE, num_keys).unsqueeze(1)
    key = torch.arange(num_keys)
    hidden = key > query if sliding_window is None else (key > query) | (key <= query - sliding_window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and signed sin of each token over both halves: x * cos + swap_halves(x) * sin is the rotation."""

    cos: torch.Tensor  # [num_tokens, 1, rotary_dim] float32
    sin: torch.Tensor  # [num_tokens, 1, rotary_dim] float32, the first half negated

    @classmethod
    def at(cls, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
        c, s = cos[positions].float(), sin[positions].float()
        return cls(torch.cat((c, c), -1).unsqueeze(1), torch.cat((-s, s), -1).unsqueeze(1))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, heads, head_dim], rotated over its first rotary_dim dims, in float32."""
        width = self.cos.shape[-1]
        if width < x.shape[-1]:
            return torch.cat((self.turn(x[..., :width]), x[..., width:]), dim=-1)
        wide = x.float()
        return (wide * self.cos).addcmul_(wide.roll(width // 2, -1), self.sin).to(x.dtype)


class CpuStep:
    """What is derived from one step's `meta`; lives until the next step replaces it.

    A layer asks for the same values as the layer before it; the first one to ask computes them.
    """

    def __init__(self, meta: AttentionMeta) -> None:
        self.meta = meta
        self._plans: dict[tuple[PoolShape, int | None], CpuPlan] = {}
        self._slot_rows: dict[PoolShape, torch.Tensor] = {}
        self._rotary: tuple[torch.Tensor, Rotary] | None = None

    def plan(self, shape: PoolShape, sliding_window: int | None) -> CpuPlan:
        key = (shape, sliding_window)
        if key not in self._plans:
            self._plans[key] = plan_attention(self.meta, shape, sliding_window)
        return self._plans[key]

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
        """Factors of this step's positions; a layer with another table computes its own."""
        if self._rotary is None or self._rotary[0] is not cos:
            self._rotary = (cos, Rotary.at(self.meta.positions, cos, sin))
        return self._rotary[1]

    def slot_rows(self, shape: PoolShape) -> torch.Tensor:
        """[num_tokens * 2 * num_kv_heads]: layer 0's rows of head_dim to which each token's K and V heads go."""
        if shape not in self._slot_rows:
            slot, size = self.meta.slot_mapping, shape.block_size
            tiles = shape.tiles((slot // size).unsqueeze(1).numpy())  # [2, num_tokens, num_kv_heads, 1]
            rows = torch.from_numpy(tiles).squeeze(-1).transpose(0, 1) * size + (slot % size)[:, None, None]
            self._slot_rows[shape] = rows.flatten()
        return self._slot_rows[shape]
