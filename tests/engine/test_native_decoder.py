"""The native decoder against the plain one on random ragged batches over poisoned pools, and its own promises.

Pools hold NaN in every slot that nobody wrote. Shapes are odd on purpose: sizes that fill no vector, panel or block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kvbaton.engine.decoder import Decoder
from kvbaton.engine.model_config import Architecture, ModelConfig, RopeConfig
from kvbaton.engine.model_loader import random_model
from kvbaton.engine.native_decoder import NativeDecoder, native_decoder
from kvbaton.engine.runner import ForwardPass
from kvbaton.kernels.meta import AttentionMeta, build_attention_meta
from kvbaton.kernels.native_lib import native_library

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


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    if native_library() is None:
        pytest.skip("no native library here: see the log for the reason")


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
    meta = build_attention_meta([q for q, _ in sequences], [c for _, c in sequences], tables, block_size, CPU)
    return Step(torch.randint(0, config.vocab_size, (meta.num_tokens,), generator=g), meta, pool, tables)


def plain(config: ModelConfig, dtype: str) -> Decoder:
    return random_model(config, 1, CPU, dtype).decoder


def native(config: ModelConfig, dtype: str) -> NativeDecoder:
    decoder = native_decoder(plain(config, dtype))
    assert isinstance(decoder, NativeDecoder)
    return decoder


def widened(config: ModelConfig, dtype: str) -> Decoder:
    """The plain decoder in float32 with the very weights that `dtype` has."""
    source, target = plain(config, dtype), plain(config, "float32")
    for theirs, ours in zip(tensors(target), tensors(source), strict=True):
        theirs.copy_(ours)
    return target


def tensors(decoder: Decoder) -> list[torch.Tensor]:
    from kvbaton.engine.weights import slots

    return [slot.target for slot in slots(decoder.config, decoder.weights)]


@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_the_plain_decoder(name: str, block_size: int) -> None:
    """Logits and every K and V written: a wrong panel, head, mask, slot or join moves them far past rounding."""
    config = CONFIGS[name]
    step = make_step(config, len(name), block_size)
    other = step.copy(torch.float32)
    want, got = step.run(plain(config, "float32")), other.run(native(config, "float32"))
    assert not got.isnan().any()
    assert float((got - want).abs().max()) < 3e-5 * float(want.abs().max())
    assert torch.equal(step.pool.isnan(), other.pool.isnan())
    torch.testing.assert_close(other.pool, step.pool, atol=5e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gqa", "tied", "window", "biases", "odd sizes"])
def test_half_precision_errs_no_more_than_the_plain_decoder(name: str, dtype: str) -> None:
    """Against float32 on the same weights, teacher-forced, by the root mean square error of the logits. The native pass
    rounds less often: 0.90 to 0.94 of the plain one's error was seen."""
    config = CONFIGS[name]
    half = getattr(torch, dtype)
    step = make_step(config, len(name)).copy(half)
    truth = step.copy(torch.float32).run(widened(config, dtype))
    errors = []
    for decoder in (plain(config, dtype), native(config, dtype)):
        errors.append(float((step.copy(half).run(decoder) - truth).square().mean().sqrt()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_does_not_depend_on_its_batch(dtype: str, threads: int) -> None:
    """To the bit: decode rows and chunks alone equal themselves in company, on any number of threads."""
    config = CONFIGS["window"]
    decoder = native(config, dtype)
    step = make_step(config, 3).copy(getattr(torch, dtype))
    torch.set_num_threads(threads)
    try:
        together = step.copy(step.pool.dtype).run(decoder)
        at = 0
        for (queries, context), table in zip(SEQUENCES, step.tables, strict=True):
            rows = slice(at, at + queries)
            meta = build_attention_meta([queries], [context], [table], 16, CPU)
            alone = replace(step, ids=step.ids[rows], meta=meta, pool=step.pool.clone()).run(decoder)
            assert torch.equal(alone, together[rows]), f"{queries} queries over {context} tokens"
            at += queries
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_of_a_prompt_are_the_whole_prompt(dtype: str) -> None:
    """To the bit, K and V too: so a prefix hit or another chunk size cannot change what follows."""
    config = CONFIGS["window"]
    decoder = native(config, dtype)
    step = make_step(config, 4, sequences=((600, 600),)).copy(getattr(torch, dtype))
    pool = step.pool.clone()
    want, at = step.run(decoder), 0
    parts = []
    for queries in (16, 100, 396, 88):
        at += queries
        meta = build_attention_meta([queries], [at], step.tables, 16, CPU)
        parts.append(Step(step.ids[at - queries : at], meta, pool, step.tables).run(decoder))
    assert torch.equal(torch.cat(parts), want)
    assert torch.equal(pool.nan_to_num(), step.pool.nan_to_num())


def test_the_plain_decoder_cannot_be_used_afterwards() -> None:
    """Its weights were taken over: reading them must raise, not compute with other memory."""
    decoder = plain(BASE, "float32")
    assert isinstance(native_decoder(decoder), NativeDecoder)
    step = make_step(BASE, 1)
    with pytest.raises(RuntimeError):
        step.run(decoder)


def test_what_does_not_fit_stays_plain() -> None:
    odd = replace(BASE, intermediate_size=177)
    decoder = plain(odd, "float32")
    assert native_decoder(decoder) is decoder


def test_another_pool_dtype_is_refused() -> None:
    step = make_step(BASE, 1)
    with pytest.raises(ValueError, match="bfloat16"):
        step.copy(torch.bfloat16).run(native(BASE, "float32"))
