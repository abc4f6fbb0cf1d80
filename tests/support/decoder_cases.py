"""Random ragged steps over poisoned pools for whole decoders, and the decoders to run them with.

Pools hold NaN in every slot that nobody wrote. Shapes are odd on purpose: sizes that fill no vector, panel or block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import random_model
from kvbaton.engine.model.model_config import Architecture, ModelConfig, RopeConfig
from kvbaton.engine.model.weights import slots
from kvbaton.engine.runner import ForwardPass
from kvbaton.kernels.meta import AttentionMeta, build_attention_meta
from support.kernel_cases import leading_ones

CPU = torch.device("cpu")
BASE = ModelConfig(
    Architecture.QWEN3, 493, 96, 176, 3, 6, 2, 16, 1e-6, 4096, RopeConfig(10000.0), (None,) * 3, qk_norm=True
)
CONFIGS = {
    "gqa": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "window": replace(BASE, sliding_windows=(None, 37, 1), num_kv_heads=6),
    "biases": replace(BASE, head_dim=64, num_heads=5, num_kv_heads=1, qkv_bias=True, o_bias=True, mlp_bias=True),
    "wide heads": replace(BASE, head_dim=128, num_heads=4, hidden_size=256, intermediate_size=400, qk_norm=False),
    "odd sizes": replace(BASE, head_dim=24, num_heads=7, num_kv_heads=1, hidden_size=100, intermediate_size=90),
    "deep products": replace(BASE, hidden_size=64, intermediate_size=5000, num_layers=2, sliding_windows=(None,) * 2),
}  # fmt: skip
# (queries, context): decode rows short, at a block's edge, over one and two parts of 512 keys; fresh and later chunks
SEQUENCES = ((1, 1), (1, 16), (1, 513), (1, 1100), (7, 7), (150, 150), (130, 700), (64, 90))


@dataclass(frozen=True, slots=True)
class Step:
    """One ragged batch over a pool of its own."""

    ids: torch.Tensor  # [num_tokens]
    meta: AttentionMeta
    pool: torch.Tensor
    tables: tuple[tuple[int, ...], ...]

    def run(self, decoder: ForwardPass) -> torch.Tensor:
        """Logits of all tokens; a copy, for a decoder may use their memory again."""
        return decoder.logits(decoder.forward(self.ids, self.pool, self.meta)).clone()

    def copy(self, dtype: torch.dtype) -> Step:
        return replace(self, pool=self.pool.to(dtype, copy=True))


def make_step(config: ModelConfig, seed: int, block_size: int = 16, sequences: tuple = SEQUENCES) -> Step:
    g = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for _, context in sequences]
    order = iter((torch.randperm(sum(counts), generator=g) + 1).tolist())
    tables = tuple(tuple(next(order) for _ in range(count)) for count in counts)
    shape = (sum(counts) + 1, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
    pool = torch.full(shape, float("nan"))
    for (queries, context), table in zip(sequences, tables, strict=True):
        for at, block in enumerate(table):
            kept = min(max(context - queries - at * block_size, 0), block_size)
            pool[block, :, :, :, :kept] = torch.randn(*shape[1:4], kept, shape[5], generator=g)
    queries, contexts = zip(*sequences, strict=True)
    meta = build_attention_meta(queries, contexts, tables, block_size, CPU, leading_ones(queries))
    return Step(torch.randint(0, config.vocab_size, (meta.num_tokens,), generator=g), meta, pool, tables)


def assert_alone_as_in_company(decoder: ForwardPass, step: Step, sequences: tuple = SEQUENCES) -> None:
    """Every sequence of `step` by itself gives the logits that it has among all, to the bit."""
    together, at = step.copy(step.pool.dtype).run(decoder), 0
    for i, ((queries, context), table) in enumerate(zip(sequences, step.tables, strict=True)):
        rows = slice(at, at + queries)
        meta = build_attention_meta([queries], [context], [table], 16, CPU, int(i < step.meta.num_decodes))
        alone = replace(step, ids=step.ids[rows], meta=meta, pool=step.pool.clone()).run(decoder)
        assert torch.equal(alone, together[rows]), f"{queries} queries over {context} tokens"
        at += queries


def plain(config: ModelConfig, dtype: str) -> Decoder:
    return random_model(config, 1, CPU, dtype).decoder


def widened(config: ModelConfig, dtype: str) -> Decoder:
    """The plain decoder in float32 with the very weights that `dtype` has."""
    source, target = plain(config, dtype), plain(config, "float32")
    for theirs, ours in zip(tensors(target), tensors(source), strict=True):
        theirs.copy_(ours)
    return target


def tensors(decoder: Decoder) -> list[torch.Tensor]:
    return [slot.target for slot in slots(decoder.config, decoder.weights)]
