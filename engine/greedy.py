"""The plainest generation loop over a `Decoder`: a private KV pool, one ragged batch, the best token each step.

No scheduler and no sharing: this is what a checkpoint is judged by when it is made, and what tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.kernels.meta import build_attention_meta

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """`smallest_gap`: by how much the best logit beat the second at the step where it was closest."""

    tokens: tuple[int, ...]
    smallest_gap: float


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[GreedyResult]:
    """`num_tokens` tokens for each prompt, whatever they are: end-of-sequence ids do not stop it."""
    config = decoder.config
    blocks_each = -(-(max(map(len, prompts)) + num_tokens) // _BLOCK_SIZE)
    shape = (blocks_each * len(prompts), config.num_layers, 2, config.num_kv_heads, _BLOCK_SIZE, config.head_dim)
    kv_cache = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
    tables = [range(i * blocks_each, (i + 1) * blocks_each) for i in range(len(prompts))]
    query = [list(prompt) for prompt in prompts]
    lengths = [0] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    gaps = [float("inf")] * len(prompts)
    for step in range(num_tokens):
        decodes = len(prompts) if step else 0
        lengths = [length + len(new) for length, new in zip(lengths, query, strict=True)]
        meta = build_attention_meta([len(new) for new in query], lengths, tables, _BLOCK_SIZE, decoder.device, decodes)
        flat = torch.tensor([token for new in query for token in new], device=decoder.device)
        hidden = decoder.forward(flat, kv_cache, meta)
        best = decoder.logits(hidden[meta.cu_seqlens_q[1:].long() - 1]).topk(2, dim=-1)
        gaps = [min(gap, one - two) for gap, (one, two) in zip(gaps, best.values.tolist(), strict=True)]
        query = best.indices[:, :1].tolist()
        for row, new in zip(tokens, query, strict=True):
            row.extend(new)
    return [GreedyResult(tuple(row), gap) for row, gap in zip(tokens, gaps, strict=True)]
