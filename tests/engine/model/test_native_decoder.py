"""The native decoder against the plain one on random ragged batches over poisoned pools, and its own promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.native_decoder import NativeDecoder, native_decoder
from kvbaton.kernels.meta import build_attention_meta
from kvbaton.kernels.native_lib import native_library
from support.decoder_cases import (
    BASE,
    CONFIGS,
    CPU,
    Step,
    assert_alone_as_in_company,
    make_step,
    plain,
    widened,
)


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    if native_library() is None:
        pytest.skip("no native library here: see the log for the reason")


def native(config: ModelConfig, dtype: str) -> NativeDecoder:
    decoder = native_decoder(plain(config, dtype))
    assert isinstance(decoder, NativeDecoder)
    return decoder


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
        assert_alone_as_in_company(decoder, step)
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
    for queries in (16, 100, 1, 395, 87, 1):
        at += queries
        meta = build_attention_meta([queries], [at], step.tables, 16, CPU, 0)
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
