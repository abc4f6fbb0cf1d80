"""A sequence moves between two decode engines over UCX while it decodes: the tokens of the unmoved run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import EngineState, Role
from support.engine_process import EngineOptions
from support.local_cluster import LocalCluster
from support.oracle import TinyModels

pytestmark = pytest.mark.ucx

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
CONTEXT = 2000


def long_prompt(length: int) -> tuple[int, ...]:
    return tuple((i * 37 + i // 11 * 5) % 200 + 20 for i in range(length))


def sampled(name: str, length: int, max_tokens: int, n: int = 1, penalty: float = 0.3) -> Request:
    """Penalties and a seed: all that a sampler could lose on the way."""
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=11, temperature=0.9, top_p=0.95, frequency_penalty=penalty, n=n, ignore_eos=True
    )
    return Request(name, long_prompt(length), sampling, tuple(range(n)))


class Reader:
    """Reads a stream in the background."""

    def __init__(self, cluster: LocalCluster, request: Request) -> None:
        self.tokens: dict[int, list[int]] = {sample: [] for sample in request.sample_indices}
        self._changed = asyncio.Event()
        self._cluster = cluster
        self.request = request
        self.task = asyncio.create_task(self._read())

    async def has(self, count: int) -> None:
        while min(map(len, self.tokens.values())) < count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 30)

    def engine(self, sample: int = 0) -> str:
        attempt = self._cluster.client.attempts.working_on(self.request.request_id, sample)
        assert attempt is not None
        return attempt.second.info.engine_id

    async def _read(self) -> dict[int, list[int]]:
        async for outputs in self._cluster.client.generate(self.request):
            for output in outputs:
                assert output.token_id is not None
                self.tokens[output.sample].append(output.token_id)
            self._changed.set()
        return self.tokens


@pytest.mark.parametrize(("pipelined", "penalty"), [("off", 0.3), ("on", 0.0)], ids=["each", "pipelined"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_long_sequence_moves_while_it_decodes(
    tiny_model: TinyModels, pipelined: str, penalty: float, dtype: str
) -> None:
    """2,000 tokens of context, there and back; and three samples of another request, one of which moves."""
    options = EngineOptions(pipelined=pipelined, dtype=dtype)
    async with LocalCluster(tiny_model(Family.LLAMA), ROLES, options) as cluster:
        still = await cluster.tokens(sampled("still", CONTEXT, 500, penalty=penalty))
        still_n = await cluster.tokens(sampled("still-n", 300, 400, 3, penalty))
        moving = Reader(cluster, sampled("moving", CONTEXT, 500, penalty=penalty))
        several = Reader(cluster, sampled("n", 300, 400, 3, penalty))
        await moving.has(10)
        await several.has(5)
        names = {"decode-1", "decode-2"}
        for reader, sample in ((moving, 0), (several, 1), (moving, 0)):
            source = reader.engine(sample)
            (target,) = names - {source}
            assert await cluster.client.migrate(reader.request.request_id, sample, target) is None
            assert reader.engine(sample) == target
        assert await moving.task == still
        assert await several.task == still_n
        assert (cluster.client.counters.migrated, cluster.client.counters.resumed) == (3, 0)
        await cluster.assert_clean()


async def test_drained_engine_empties_while_its_streams_go_on(tiny_model: TinyModels) -> None:
    async with LocalCluster(tiny_model(Family.QWEN3), ROLES, EngineOptions(dtype="bfloat16")) as cluster:
        requests = [sampled(f"r{i}", 60 + 40 * i, 500) for i in range(4)]
        still = [await cluster.tokens(request) for request in requests]
        readers = [Reader(cluster, request) for request in requests]
        for reader in readers:
            await reader.has(5)
        source = readers[0].engine()
        infos = cluster.membership.engines
        cluster.membership.set(
            tuple(replace(i, state=EngineState.DRAINING) if i.engine_id == source else i for i in infos)
        )
        engine = cluster.engines[source]
        await cluster.until(lambda: engine.stats().requests == 0, "the drained engine is empty")
        assert not all(reader.task.done() for reader in readers)
        assert [await reader.task for reader in readers] == still
        assert cluster.client.counters.migrated >= 1
        assert cluster.client.counters.resumed == 0
        await cluster.assert_clean()
