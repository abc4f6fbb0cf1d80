"""Steps that overlap change no token: every kind of request, together in one engine, with and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.orders import Abort
from kvbaton.engine.request import Request, SamplingParams, TokenOutput
from kvbaton.engine.sampling import device_sampler
from kvbaton.engine.sampling.sampler import sample_tokens
from kvbaton.engine.tiny import Family
from support.oracle import TinyModels, prompts
from support.worker_bench import SESSION, WorkerBench

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 1},
    "cut": {"seed": 2, "top_p": 0.9, "top_k": 40},
    "nucleus": {"seed": 3, "top_p": 0.98, "temperature": 1.4},
    "least": {"seed": 4, "min_p": 0.02},
    "samples": {"seed": 5, "n": 3},
    "penalties": {"seed": 6, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "max_tokens": 12},
    "bias": {"seed": 7, "logit_bias": ((5, 4.0), (9, -4.0)), "max_tokens": 9},
    "logprobs": {"temperature": 0.0, "logprobs": 2, "max_tokens": 10},
    "prompt-logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "stopping": {"seed": 8, "stop_token_ids": tuple(range(0, 512, 9)), "min_tokens": 6},
}


def outputs(model: Path, pipelined: str, wanted: list[tuple[str, dict[str, Any]]], blocks: int) -> list[TokenOutput]:
    """Of all requests, which come one after the other while earlier ones run. In small chunks."""
    config = EngineConfig(model, dtype="float32", cache=CacheConfig(kv_memory_bytes=1 << 20), pipelined=pipelined)
    engine = Engine.load(config)
    pool = blocks * engine.geometry.block_bytes
    config = EngineConfig(model, dtype="float32", cache=CacheConfig(kv_memory_bytes=pool), pipelined=pipelined)
    bench = WorkerBench(Engine.load(config), BatchConfig(max_tokens_per_step=96, prefill_chunk_tokens=24))
    for i, (name, kind) in enumerate(wanted):
        sampling = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **kind})
        bench.submit(Request(name, tuple(prompts()[i % 7]), sampling, tuple(range(sampling.n))))
        bench.step()
    bench.run()
    bench.assert_clean()
    return bench.outputs


def by_sample(found: list[TokenOutput]) -> dict[tuple[str, int], list[tuple[object, ...]]]:
    samples: dict[tuple[str, int], list[tuple[object, ...]]] = {}
    for o in found:
        chosen = None if o.logprobs is None else [token for token, _ in o.logprobs.top]
        told = o.prompt_logprobs and len(o.prompt_logprobs)
        samples.setdefault((o.request_id, o.sample), []).append((o.index, o.token_id, o.finish, chosen, told))
    return samples


@pytest.mark.parametrize("blocks", [400, 24], ids=["room", "preempted"])
@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN3_MOE])
def test_requests_of_every_kind_in_one_batch(tiny_model: TinyModels, family: Family, blocks: int) -> None:
    model, wanted = tiny_model(family), list(KINDS.items())
    each = by_sample(outputs(model, "off", wanted, blocks))
    assert by_sample(outputs(model, "on", wanted, blocks)) == each
    assert len(each) == len(KINDS) + 2


@pytest.mark.parametrize("horizon", [4, 64])
def test_draws_that_the_device_cannot_make(
    tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch, horizon: int
) -> None:
    """Cuts beyond the horizon, among rows without: the step on top of such a draw has read nothing of use."""
    model = tiny_model(Family.LLAMA)
    wanted = [(f"{name}-{i}", KINDS[name]) for i in range(2) for name in ("greedy", "nucleus", "sampled", "cut")]
    each = by_sample(outputs(model, "off", wanted, 400))
    again: list[int] = []

    def counted(logits: Any, draws: Any) -> Any:
        again.append(len(draws))
        return sample_tokens(logits, draws)

    monkeypatch.setattr(device_sampler, "HORIZON", horizon)
    monkeypatch.setattr(device_sampler, "sample_tokens", counted)
    assert by_sample(outputs(model, "on", wanted, 400)) == each
    assert sum(again) > 20, "too few to mean anything"


def test_abort_while_the_next_step_is_on_its_way(
    tiny_model: TinyModels, oracle_tokens: Callable[[Path, list[int], int], list[int]]
) -> None:
    """Blocks of a sequence that ended go to another one, whose tokens must be its own."""
    model = tiny_model(Family.LLAMA)
    probe = Engine.load(EngineConfig(model, cache=CacheConfig(kv_memory_bytes=1 << 20))).geometry.block_bytes
    config = EngineConfig(model, dtype="float32", cache=CacheConfig(kv_memory_bytes=14 * probe), pipelined="on")
    bench = WorkerBench(Engine.load(config), BatchConfig(prefill_chunk_tokens=16))
    for i in range(12):
        sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        bench.submit(Request(f"r{i}", tuple(prompts()[i % 5]), sampling))
        for _ in range(5):
            bench.step()
        if i % 2:
            bench.worker.handle(Abort(SESSION, f"r{i}"), bench.now)
    bench.run()
    for i in range(0, 12, 2):
        assert bench.tokens(f"r{i}") == oracle_tokens(model, prompts()[i % 5], 30)
    bench.assert_clean()
