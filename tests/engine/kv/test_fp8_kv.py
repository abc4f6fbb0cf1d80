"""8-bit KV: half the bytes, named to peers, saturating, and within a stated distance of the model's own dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbaton.engine.config import CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.kv.kv_cache import KVCache, KVGeometry
from kvbaton.kernels import reference
from kvbaton.kernels.quantization import FP8, FP8_MAX, storage, to_kv
from kvbaton.settings import ConfigError
from support.engine_driver import EngineDriver
from support.oracle import TinyModels, oracle_logits, prompts

CPU = torch.device("cpu")
# |error| / |value| of a prompt's log-probabilities against transformers in float32, teacher-forced. The tiny models are
# sharpened on purpose; the dense ones were at 0.026 to 0.071 over four prompts (logits: 0.10 to 0.18), float32 at 1e-6.
LOGPROB_TOLERANCE = 0.1


@pytest.fixture
def config(tiny_model: TinyModels) -> EngineConfig:
    return EngineConfig(tiny_model("llama"), cache=CacheConfig(kv_memory_bytes=4 << 20, kv_dtype="fp8_e4m3"))


def test_every_value_of_e4m3_survives_and_larger_ones_saturate() -> None:
    """torch's own cast turns 449 into NaN, and one NaN in a block ruins every later token of the sequence."""
    held = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = held[held.isfinite()]
    assert torch.equal(to_kv(finite, FP8).float(), finite)
    large = torch.tensor([449.0, -1e30, float("inf")])
    assert to_kv(large, FP8).float().tolist() == [FP8_MAX, -FP8_MAX, FP8_MAX]
    assert to_kv(torch.tensor([1e4]).half(), FP8).float().item() == FP8_MAX


def test_blocks_are_half_as_large_and_move_as_bytes() -> None:
    """Guards the geometry that transfers and memory planning count with, and copies of 8-bit floats bit for bit."""
    geometry = KVGeometry(2, 2, 8, 4, FP8)
    assert geometry.block_bytes * 2 == replace(geometry, dtype=torch.bfloat16).block_bytes
    cache = KVCache(geometry, 5, CPU)
    pool = storage(cache.pool)
    pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8))  # NaNs among them
    before = pool.clone()
    reference.copy_blocks(cache.pool, torch.tensor([3, 3, 0]), torch.tensor([1, 4, 2]))
    assert torch.equal(pool, before[[0, 3, 0, 3, 3]])
    assert bytes(cache.block(4)) == before[3].numpy().tobytes()


def test_peers_are_told(config: EngineConfig) -> None:
    """A block of 8-bit floats read as bfloat16 is garbage: the hand-off must refuse the pair by name."""
    own = dict(Engine.load(config).compatibility())
    plain = dict(Engine.load(replace(config, cache=replace(config.cache, kv_dtype="auto"))).compatibility())
    assert own["dtype"] == "float8_e4m3fn"
    assert {field for field in own if own[field] != plain[field]} == {"dtype"}


def test_an_unknown_kv_dtype_is_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_dtype: must be one of auto, fp8_e4m3, got 'fp8'"):
        replace(config.cache, kv_dtype="fp8")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_prompt_logprobs_stay_close_to_transformers(tiny_model: TinyModels, config: EngineConfig, family: str) -> None:
    """Guards scale, rounding and the read path: a wrong scale or a swapped K and V is off by far more than rounding.

    Teacher-forced: every position sees the same tokens, so one early difference does not make all later ones.
    """
    folder: Path = tiny_model(family)
    prompt = prompts()[4]
    driver = EngineDriver(Engine.load(replace(config, model=folder)))
    seq = driver.add(prompt, prompt_logprobs=0)
    got = [one for at in (40, len(prompt) - 40) for one in driver.step((seq, at)).prompt_logprobs[0] or ()]
    driver.finish()
    logits = oracle_logits(folder, prompt)
    want = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    error = torch.tensor([one.logprob for one in got if one is not None]) - want
    assert len(error) == len(prompt) - 1
    assert float(error.norm() / want.norm()) < LOGPROB_TOLERANCE
    assert float(error.abs().max()) > 0.0, "8-bit KV changed nothing: was it used?"
