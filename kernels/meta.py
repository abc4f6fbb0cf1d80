"""The shape of one ragged batch: which tokens are whose, at which position, and where their KV lies.

Built once a step from host lists, then read by every layer. A *piece* is a run of query tokens of one sequence; those
that are decodes, of one token, come first:

    tokens      [ d0 | d1 | d1 | p3 p3 p3 p3 p3 | p4 ]     num_decodes = 3
    cu_seqlens  [ 0    1    2    3               8   9 ]

A piece of q tokens and a context of c tokens has its queries at positions c - q .. c - 1. Whoever builds a batch says
how many pieces are decodes: decode and prefill attention add in different orders, so a piece of a prompt goes to the
second though it has one token. Pieces of one sequence may share its block table: each sees the keys of its own context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Tensors live on the engine's device; tuples and ints are host twins, so that no launch waits for the device."""

    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64: block_id * block_size + offset
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32, one row a piece, padded with block 0
    cu_seqlens_q: torch.Tensor  # [num_seqs + 1] int32
    context_lens: torch.Tensor  # [num_seqs] int32, tokens of this step included
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    max_context_len: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)


def build_attention_meta(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device,
    num_decodes: int,
) -> AttentionMeta:
    """One host buffer, one copy to the device. Block tables may be longer than the context needs, never shorter.

    Raises ValueError where a piece has no query, more queries than context, or too few blocks, and where one of the
    first `num_decodes` has several queries.
    """
    q = np.asarray(query_lens, dtype=np.int64)
    c = np.asarray(context_lens, dtype=np.int64)
    needed = -(-c // block_size)
    _check(q, c, needed, block_tables)
    if not 0 <= num_decodes <= len(q) or (q[:num_decodes] != 1).any():
        raise ValueError(f"{num_decodes} decode pieces of one query in {q.tolist()}")
    tables = _pad_tables(block_tables, needed)
    cu = np.zeros(len(q) + 1, dtype=np.int64)
    np.cumsum(q, out=cu[1:])
    row = np.repeat(np.arange(len(q)), q)
    positions = np.arange(cu[-1]) + (c - q - cu[:-1])[row]
    slots = tables[row, positions // block_size] * block_size + positions % block_size
    long = _to_device(np.concatenate((positions, slots)), device)
    short = _to_device(np.concatenate((cu, c, tables.ravel())).astype(np.int32), device)
    num_tokens, num_seqs = int(cu[-1]), len(q)
    return AttentionMeta(
        positions=long[:num_tokens],
        slot_mapping=long[num_tokens:],
        block_tables=short[2 * num_seqs + 1 :].view(num_seqs, tables.shape[1]),
        cu_seqlens_q=short[: num_seqs + 1],
        context_lens=short[num_seqs + 1 : 2 * num_seqs + 1],
        num_decodes=num_decodes,
        query_lens=tuple(query_lens),
        context_lens_host=tuple(context_lens),
        max_context_len=int(c.max(initial=0)),
        block_size=block_size,
    )


def _check(
    q: npt.NDArray[np.int64],
    c: npt.NDArray[np.int64],
    needed: npt.NDArray[np.int64],
    block_tables: Sequence[Sequence[int]],
) -> None:
    have = np.fromiter(map(len, block_tables), dtype=np.int64, count=len(block_tables))
    if not len(q) == len(c) == len(have):
        raise ValueError(f"{len(q)} query lengths, {len(c)} context lengths, {len(have)} block tables")
    bad = np.flatnonzero((q < 1) | (q > c) | (have < needed))
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"piece {i}: {q[i]} queries in a context of {c[i]}, {have[i]} of {needed[i]} blocks")


def _pad_tables(
    block_tables: Sequence[Sequence[int]], needed: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:  # [num_seqs, max_blocks]
    """Rows of unequal length as one array, in one pass over the ids."""
    width = int(needed.max(initial=1))
    total = int(needed.sum())
    used = chain.from_iterable(table[:n] for table, n in zip(block_tables, needed.tolist(), strict=True))
    tables = np.zeros((len(needed), width), dtype=np.int64)
    tables[np.arange(width) < needed[:, None]] = np.fromiter(used, dtype=np.int64, count=total)
    return tables


def _to_device(flat: npt.NDArray[np.int64] | npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
