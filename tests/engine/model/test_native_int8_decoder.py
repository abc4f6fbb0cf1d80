"""The native decoder with 8-bit weights against the plain one with the same integers, and its own promises."""

from __future__ import annotations

import pytest
import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import random_model
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.native_decoder import NativeDecoder, native_decoder
from kvbaton.engine.model.weights import Int8Matrix, Matrix, plain, slots
from kvbaton.kernels.native_lib import native_library
from support.decoder_cases import CONFIGS, CPU, assert_alone_as_in_company, make_step


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    if native_library() is None:
        pytest.skip("no native library here: see the log for the reason")


def quantized(config: ModelConfig, dtype: str) -> Decoder:
    return random_model(config, 1, CPU, dtype, quantization="int8").decoder


def native(config: ModelConfig, dtype: str) -> NativeDecoder:
    decoder = native_decoder(quantized(config, dtype))
    assert isinstance(decoder, NativeDecoder)
    return decoder


def matrices(decoder: Decoder) -> list[Matrix]:
    """All that a checkpoint fills, and the output projection, which a tied one makes of the embedding."""
    return [*(slot.target for slot in slots(decoder.config, decoder.weights)), decoder.weights.lm_head]


def widened(config: ModelConfig, dtype: str) -> Decoder:
    """The plain decoder in float32 with the very integers, embedding and norms that `dtype` has."""
    source, target = quantized(config, dtype), quantized(config, "float32")
    pairs = zip(matrices(source), matrices(target), strict=True)
    for ours, theirs in pairs:
        if isinstance(ours, Int8Matrix) and isinstance(theirs, Int8Matrix):
            theirs.weight.copy_(ours.weight)
            theirs.scale.copy_(ours.scale)
        else:
            plain(theirs).copy_(plain(ours))
    return target


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_the_plain_decoder(name: str) -> None:
    """Logits and every K and V written: scales in another order than their columns, of gate and up most of all, or an
    embedding that is read from integers, move them far past rounding."""
    config = CONFIGS[name]
    step = make_step(config, len(name))
    other = step.copy(torch.float32)
    want, got = step.run(quantized(config, "float32")), other.run(native(config, "float32"))
    assert not got.isnan().any()
    assert float((got - want).abs().max()) < 3e-5 * float(want.abs().max())
    torch.testing.assert_close(other.pool, step.pool, atol=5e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gqa", "tied", "biases", "odd sizes"])
def test_half_precision_errs_no_more_than_the_plain_decoder(name: str, dtype: str) -> None:
    """Against float32 with the same integers, teacher-forced, by the root mean square error of the logits."""
    config = CONFIGS[name]
    half = getattr(torch, dtype)
    step = make_step(config, len(name)).copy(half)
    truth = step.copy(torch.float32).run(widened(config, dtype))
    errors = []
    for decoder in (quantized(config, dtype), native(config, dtype)):
        errors.append(float((step.copy(half).run(decoder) - truth).square().mean().sqrt()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch(dtype: str, threads: int) -> None:
    """To the bit: decode rows and chunks alone equal themselves in company, on any number of threads."""
    config = CONFIGS["biases"]
    decoder = native(config, dtype)
    step = make_step(config, 3).copy(getattr(torch, dtype))
    torch.set_num_threads(threads)
    try:
        assert_alone_as_in_company(decoder, step)
    finally:
        torch.set_num_threads(1)


def test_the_integers_are_taken_over() -> None:
    """A model must not lie in memory twice: reading the plain form afterwards raises."""
    decoder = quantized(CONFIGS["tied"], "bfloat16")
    assert isinstance(native_decoder(decoder), NativeDecoder)
    step = make_step(CONFIGS["tied"], 1).copy(torch.bfloat16)
    with pytest.raises(RuntimeError):
        step.run(decoder)
