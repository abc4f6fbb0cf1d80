"""8-bit weights, whichever way a request takes: tokens equal transformers' on the values that integers stand for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbaton.engine import engine as engine_module
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import Role
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import TinyModels, dequantized, oracle_tokens, prompts
from support.worker_bench import WorkerBench

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
FAMILIES = (Family.LLAMA, Family.QWEN2, Family.QWEN3)
INT8 = EngineOptions(quantization="int8")
Oracle = Callable[[Family], list[list[int]]]


@pytest.fixture(scope="module")
def oracle(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The tokens of every prompt, by family; each model is made once."""
    root, made = tmp_path_factory.mktemp("dequantized"), dict[Family, Path]()

    def tokens(family: Family) -> list[list[int]]:
        if family not in made:
            made[family] = dequantized(tiny_model(family), root / family)
        return [oracle_tokens(made[family], prompt, NUM_TOKENS) for prompt in prompts()]

    return tokens


def greedy(name: str, prompt: list[int], max_tokens: int = NUM_TOKENS) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


def bench(model: Path, pipelined: str = "off", kv_blocks: int = 400) -> WorkerBench:
    cache = CacheConfig(kv_memory_bytes=kv_blocks * 16384)
    config = EngineConfig(model, dtype="float32", cache=cache, pipelined=pipelined, quantization="int8")
    return WorkerBench(Engine.load(config), BatchConfig(max_tokens_per_step=256, prefill_chunk_tokens=64))


def run_twice(made: WorkerBench, want: list[list[int]]) -> None:
    """All prompts at once, then one by one, whose beginnings are cached by then."""
    for i, prompt in enumerate(prompts()):
        made.submit(greedy(f"together-{i}", prompt))
    made.run()
    for i, prompt in enumerate(prompts()):
        made.submit(greedy(f"again-{i}", prompt))
        made.run()
    for i, tokens in enumerate(want):
        assert made.tokens(f"together-{i}") == tokens, i
        assert made.tokens(f"again-{i}") == tokens, i
    made.assert_clean()


@pytest.mark.parametrize("pipelined", ["off", "on"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_engine(tiny_model: TinyModels, oracle: Oracle, family: Family, pipelined: str) -> None:
    """Chunked prefill, ragged batches and prefix hits; a pool of 22 blocks of the first family preempts as well."""
    small = family is Family.LLAMA
    made = bench(tiny_model(family), pipelined, 22 if small else 400)
    run_twice(made, oracle(family))
    assert (made.worker.decode.scheduler.num_preemptions > 0) is small


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_path(
    tiny_model: TinyModels, oracle: Oracle, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What engines without a native library compute, and GPUs operator by operator."""
    kept: list[object] = []
    monkeypatch.setattr(engine_module, "native_decoder", lambda decoder: kept.append(decoder) or decoder)
    made = bench(tiny_model(family))
    assert [type(decoder) for decoder in kept] == [Decoder]
    run_twice(made, oracle(family))


@pytest.mark.ucx
@pytest.mark.parametrize("family", FAMILIES)
async def test_split(tiny_model: TinyModels, oracle: Oracle, family: Family) -> None:
    """Prefill and decode in two processes, all prompts at once."""
    want = oracle(family)
    async with LocalCluster(tiny_model(family), options=INT8) as cluster:
        requests = [greedy(f"r{i}", prompt) for i, prompt in enumerate(prompts())]
        assert await asyncio.gather(*map(cluster.tokens, requests)) == [{0: tokens} for tokens in want]
        await cluster.assert_clean()
        assert cluster.engines["prefill-0"].stats().transfer.handoffs_acked == len(requests)


def engine_of(cluster: LocalCluster, request_id: str) -> str:
    """Where a request decodes now."""
    attempt = cluster.client.attempts.working_on(request_id, 0)
    assert attempt is not None
    return attempt.second.info.engine_id


@pytest.mark.ucx
async def test_moved_and_resumed(tiny_model: TinyModels, oracle: Oracle) -> None:
    """A stream moves to the other decode engine, which then is killed: it is computed anew from its tokens."""
    want, prompt = oracle(Family.QWEN3)[4], prompts()[4]
    roles = (Role.PREFILL, Role.DECODE, Role.DECODE)
    slow = EngineOptions(quantization="int8", prefix_cache=False)
    async with LocalCluster(tiny_model(Family.QWEN3), roles, slow) as cluster:
        for name in ("decode-1", "decode-2"):
            await asyncio.to_thread(cluster.engines[name].slow_down, 0.02)
        tokens: list[int | None] = []
        moving: asyncio.Task[str | None] | None = None
        killed = None
        async for outputs in cluster.client.generate(greedy("r", prompt)):
            tokens += [output.token_id for output in outputs]
            if moving is None and len(tokens) >= 5:
                target = ({"decode-1", "decode-2"} - {engine_of(cluster, "r")}).pop()
                moving = asyncio.create_task(cluster.client.migrate("r", 0, target))
            elif killed is None and moving is not None and moving.done():
                assert (moving.result(), engine_of(cluster, "r")) == (None, target)
                killed = cluster.engines.pop(target)
                killed.kill()
        assert killed is not None
        assert tokens == want
        assert (cluster.client.counters.migrated, cluster.client.counters.resumed) == (1, 1)
        await cluster.assert_clean()


@pytest.mark.ucx
async def test_engines_with_other_weights_refuse_each_other(
    tiny_model: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """KV of one kind under the other's weights would be the output of neither model. One engine serves the request."""
    async with LocalCluster(tiny_model(Family.LLAMA), special={"prefill-0": INT8}) as cluster:
        answer = await cluster.tokens(greedy("r", prompts()[5]))
        assert len(answer[0]) == NUM_TOKENS
        assert cluster.client.counters.resumed == 1
        assert re.search("quantization is '(int8|none)' here and '(int8|none)' at the peer", caplog.text)
        await cluster.assert_clean()
        assert cluster.engines["decode-1"].stats().transfer.bytes_received == 0
