"""Prefill attention by torch's own flash attention (FlashAttention-2), instead of ours.

The version that comes with torch reads K and V from contiguous rows: its `block_table` is only for versions that are
installed separately. So the contexts of a step are gathered out of their blocks first, layer by layer, which costs a
read and a write of each. A row's sums may depend on how its prompt is cut into chunks, unlike with `triton_prefill`.

For bfloat16 and float16, compute capability 8.0 and later.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.triton_copy import gather_context


class VarlenAttention(Protocol):
    """Causal attention over contiguous rows, the last query of each sequence at the last key."""

    def __call__(
        self,
        q: torch.Tensor,  # [queries, heads, head_dim]
        k: torch.Tensor,  # [keys, kv_heads, head_dim]
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,  # [num_seqs + 1] int32, from 0 on; likewise of k
        cu_seqlens_k: torch.Tensor,
        longest: tuple[int, int],  # query and context
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """[queries, heads, head_dim]"""
        ...


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    longest: tuple[int, int],
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """A `VarlenAttention`. The operator under `torch.nn.attention.varlen`, whose own signature differs between torch
    2.11 and 2.13."""
    left = -1 if sliding_window is None else sliding_window - 1  # keys before the query's own
    causal = sliding_window is None  # a window that ends at the query is causal by itself
    result = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    out: torch.Tensor = result[0]
    return out


def gathered_prefill_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    meta: AttentionMeta,
    scale: float,
    sliding_window: int | None,
    attention: VarlenAttention = flash_attention,
) -> torch.Tensor:
    """The rows of `meta` behind its decode rows, of which there is at least one: q [num_tokens - num_decodes, heads,
    head_dim] -> a new tensor of the same shape."""
    n = meta.num_decodes
    contexts, lens = meta.context_lens_host[n:], meta.context_lens[n:]
    longest = max(meta.query_lens[n:]), max(contexts)
    cu_seqlens_k = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    k, v = gather_context(kv_cache[:, layer], meta.block_tables[n:], cu_seqlens_k, sum(contexts), longest[1], q.dtype)
    return attention(q, k, v, meta.cu_seqlens_q[n:] - n, cu_seqlens_k, longest, scale, sliding_window)
