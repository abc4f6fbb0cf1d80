"""The decoder against transformers, in float32 on all six families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbaton.engine.greedy import generate
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import LoadedModel, load_model
from kvbaton.engine.model.model_config import RopeConfig
from kvbaton.engine.tiny import MIN_DISTINCT, MIN_GAP
from kvbaton.kernels.cpu import CpuKernels
from kvbaton.kernels.meta import build_attention_meta
from support.oracle import FAMILIES, NUM_TOKENS, TinyModels, oracle_logits, prompts

CPU = torch.device("cpu")
BLOCK_SIZE = 16
TOLERANCE = 2e-4  # logits have a standard deviation of about 5

OracleTokens = Callable[[Path, list[int], int], list[int]]


class Pool:
    """A KV pool full of NaN, so that reading an unwritten slot shows, with scattered blocks for each sequence."""

    def __init__(self, model: LoadedModel, num_seqs: int, max_tokens: int) -> None:
        config = model.config
        width = -(-max_tokens // BLOCK_SIZE)
        order = torch.randperm(num_seqs * width, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(num_seqs, width).tolist()
        shape = (num_seqs * width, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=model.decoder.dtype)
        self.model = model

    def run(self, seqs: list[int], chunks: list[list[int]], done: list[int]) -> list[torch.Tensor]:
        """Logits of each chunk, [len(chunk), vocab]; `done` tokens of each sequence are in the pool."""
        lens = [len(chunk) for chunk in chunks]
        decodes = next((i for i, length in enumerate(lens) if length > 1), len(lens))
        contexts = [length + before for length, before in zip(lens, done, strict=True)]
        meta = build_attention_meta(lens, contexts, [self.tables[i] for i in seqs], BLOCK_SIZE, CPU, decodes)
        flat = torch.tensor([token for chunk in chunks for token in chunk])
        hidden = self.model.decoder.forward(flat, self.cache, meta)
        return list(self.model.decoder.logits(hidden).split(lens))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_logits_equal_transformers(tiny_model: TinyModels, family: str) -> None:
    """Guards every piece of arithmetic: biases, norms, rope scaling, windows, routing."""
    folder = tiny_model(family)
    model = load_model(folder, CPU)
    for prompt in prompts():
        (logits,) = Pool(model, 1, len(prompt)).run([0], [prompt], [0])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, oracle_logits(folder, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_size", [1, 16, 37])
def test_chunks_over_a_cached_prefix_equal_transformers(tiny_model: TinyModels, family: str, chunk_size: int) -> None:
    """Guards positions and masks of a chunk that starts within a sequence, on and off block borders."""
    folder = tiny_model(family)
    prompt = prompts()[4][:75]
    pool = Pool(load_model(folder, CPU), 1, len(prompt))
    parts = []
    for start in range(0, len(prompt), chunk_size):
        parts += pool.run([0], [prompt[start : start + chunk_size]], [start])
    torch.testing.assert_close(torch.cat(parts), oracle_logits(folder, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_rows_and_chunks_in_one_batch_equal_transformers(tiny_model: TinyModels, family: str) -> None:
    """Guards the ragged batch: two decode rows, a chunk over a prefix and a whole prompt must not see each other."""
    folder = tiny_model(family)
    model = load_model(folder, CPU)
    texts = [prompts()[i] for i in (2, 4, 5, 3)]
    done = [len(texts[0]) - 1, len(texts[1]) - 1, 40, 0]
    pool = Pool(model, len(texts), max(map(len, texts)))
    for i in range(3):
        pool.run([i], [texts[i][: done[i]]], [0])
    mixed = pool.run([0, 1, 2, 3], [text[start:] for text, start in zip(texts, done, strict=True)], done)
    for text, start, logits in zip(texts, done, mixed, strict=True):
        torch.testing.assert_close(logits, oracle_logits(folder, text)[start:], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(tiny_model: TinyModels, oracle_tokens: OracleTokens, family: str) -> None:
    """Guards generation as a whole, and the recorded seeds: output must be varied, with clear winners."""
    folder = tiny_model(family)
    results = generate(load_model(folder, CPU).decoder, prompts(), NUM_TOKENS)
    for prompt, result in zip(prompts(), results, strict=True):
        assert list(result.tokens) == oracle_tokens(folder, prompt, NUM_TOKENS)
        assert result.smallest_gap > MIN_GAP
        assert len(set(result.tokens)) >= MIN_DISTINCT


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope": RopeConfig(theta=10000.0)}),
        ("mistral", {"sliding_windows": (None,) * 4}),
        ("mistral", {"sliding_windows": (63,) * 4}),
    ],
)
def test_the_oracle_sees_a_wrong_option(tiny_model: TinyModels, family: str, change: dict[str, Any]) -> None:
    """Guards the tests above: an option without effect on these checkpoints would never be checked by them."""
    folder = tiny_model(family)
    right = load_model(folder, CPU)
    config = replace(right.config, **change)
    wrong = LoadedModel(config, Decoder(config, right.decoder.weights, CpuKernels()), "")
    prompt = prompts()[-1]
    (logits,) = Pool(wrong, 1, len(prompt)).run([0], [prompt], [0])
    assert (logits[-1] - oracle_logits(folder, prompt)[-1]).abs().max() > 100 * TOLERANCE


def test_bfloat16_stays_close_to_float32(tiny_model: TinyModels) -> None:
    """Guards conversion at load: a wrong cast or a half-loaded buffer is far outside rounding."""
    folder = tiny_model("llama")
    prompt = prompts()[3]
    for dtype, limit in (("bfloat16", 0.1), ("float16", 0.02)):
        model = load_model(folder, CPU, dtype)
        assert model.decoder.dtype == getattr(torch, dtype)
        (logits,) = Pool(model, 1, len(prompt)).run([0], [prompt], [0])
        wanted = oracle_logits(folder, prompt)
        assert (logits - wanted).norm() / wanted.norm() < limit
