"""One engine, whole path below the sockets: tokens equal transformers' greedy ones, token by token, in float32.

Each step on its own, and with the next step scheduled and launched before the last one's tokens are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from support.oracle import FAMILIES, TinyModels, oracle_tokens, prompts
from support.worker_bench import WorkerBench

pytestmark = pytest.mark.slow

NUM_TOKENS = 64


class MakeBench(Protocol):
    def __call__(self, model: Path, kv_blocks: int = 400, **limits: int) -> WorkerBench: ...


@pytest.fixture(params=["off", "on"], ids=["each", "pipelined"])
def make_bench(request: pytest.FixtureRequest) -> MakeBench:
    def make(model: Path, kv_blocks: int = 400, **limits: int) -> WorkerBench:
        config = EngineConfig(model, dtype="float32", cache=CacheConfig(kv_memory_bytes=1 << 30))
        probe = Engine.load(config).geometry.block_bytes
        cache = CacheConfig(kv_memory_bytes=kv_blocks * probe)
        return WorkerBench(Engine.load(replace(config, cache=cache, pipelined=request.param)), BatchConfig(**limits))

    return make


def greedy(name: str, prompt: Sequence[int], max_tokens: int = NUM_TOKENS) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


def sampled(name: str, prompt: Sequence[int], seed: int, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=32, temperature=1.0, top_p=0.95, top_k=50, seed=seed, n=n)
    return Request(name, tuple(prompt), params, tuple(range(n)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [16, 64, 4096])
def test_prompts_one_by_one(make_bench: MakeBench, tiny_model: TinyModels, family: Family, chunk: int) -> None:
    """Chunked prefill of 16, 64 and the whole prompt; later prompts may hit the cache of earlier ones."""
    model = tiny_model(family)
    bench = make_bench(model, prefill_chunk_tokens=chunk, max_tokens_per_step=4096)
    for i, prompt in enumerate(prompts()):
        bench.submit(greedy(f"p{i}", prompt))
        bench.run()
        assert bench.tokens(f"p{i}") == oracle_tokens(model, prompt, NUM_TOKENS), f"prompt {i}"
    bench.assert_clean()


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_at_once(make_bench: MakeBench, tiny_model: TinyModels, family: Family) -> None:
    """Ragged batches: prompts of different lengths arrive while others decode."""
    model = tiny_model(family)
    bench = make_bench(model, max_tokens_per_step=256, prefill_chunk_tokens=64)
    wanted = [(prompt, length) for length in (64, 17, 40) for prompt in prompts()][:16]
    for i, (prompt, length) in enumerate(wanted):
        bench.submit(greedy(f"r{i}", prompt, length))
        if i % 3 == 0:
            bench.step()
    bench.run()
    for i, (prompt, length) in enumerate(wanted):
        assert bench.tokens(f"r{i}") == oracle_tokens(model, prompt, NUM_TOKENS)[:length], f"request {i}"
    bench.assert_clean()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_partial_prefix_hits(make_bench: MakeBench, tiny_model: TinyModels, family: Family) -> None:
    """A prompt seen before, and one that shares only its first blocks, give the same tokens as without a cache."""
    model = tiny_model(family)
    bench = make_bench(model)
    long = max(prompts(), key=len)
    changed = [*long[:100], *prompts()[0], *long[100:150]]
    for name, prompt in (("cold", long), ("full", long), ("partial", changed)):
        bench.submit(greedy(name, prompt))
        bench.run()
        assert bench.tokens(name) == oracle_tokens(model, prompt, NUM_TOKENS), name
    cached = {o.request_id: o.cached_tokens for o in bench.outputs if o.index == 0}
    assert cached == {"cold": 0, "full": (len(long) - 1) // 16 * 16, "partial": 96}
    bench.assert_clean()


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_by_a_tiny_pool(make_bench: MakeBench, tiny_model: TinyModels, family: Family) -> None:
    """Sequences lose all blocks in mid-stream and are recomputed."""
    model = tiny_model(family)
    bench = make_bench(model, kv_blocks=22)
    for i, prompt in enumerate(prompts()):
        bench.submit(greedy(f"r{i}", prompt))
    bench.run()
    assert bench.worker.decode.scheduler.num_preemptions > 0
    for i, prompt in enumerate(prompts()):
        assert bench.tokens(f"r{i}") == oracle_tokens(model, prompt, NUM_TOKENS), f"request {i}"
    bench.assert_clean()


@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN3_MOE])
def test_sampled_tokens_do_not_depend_on_the_batch(
    make_bench: MakeBench, tiny_model: TinyModels, family: Family
) -> None:
    """A seeded request draws the same tokens alone and among fifteen others, and so does each sample of n."""
    model = tiny_model(family)
    alone = make_bench(model)
    for seed in range(4):
        alone.submit(sampled(f"s{seed}", prompts()[seed], seed))
        alone.run()
    alone.submit(sampled("many", prompts()[2], 99, n=5))
    alone.run()
    crowd = make_bench(model, max_tokens_per_step=128, prefill_chunk_tokens=32)
    for i in range(11):
        crowd.submit(sampled(f"other{i}", prompts()[i % 7], 1000 + i))
    for seed in range(4):
        crowd.submit(sampled(f"s{seed}", prompts()[seed], seed))
    crowd.submit(sampled("many", prompts()[2], 99, n=5))
    crowd.run()
    for seed in range(4):
        assert crowd.tokens(f"s{seed}") == alone.tokens(f"s{seed}")
    drawn = [alone.tokens("many", sample) for sample in range(5)]
    assert drawn == [crowd.tokens("many", sample) for sample in range(5)]
    assert len({tuple(tokens) for tokens in drawn}) == 5, "samples must differ"
    crowd.assert_clean()
