"""A client that closes its connection: every block is back on both engines within a second, as `/metrics` tells it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest

from kvbaton.cluster.host.engine_host import EngineStats
from kvbaton.engine.tiny import Family
from support.http_endpoint import MODEL_ID, held_blocks, http_endpoint
from support.live_cluster import until_told
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import TinyModels

pytestmark = pytest.mark.ucx

PREFILL, DECODE = "prefill-0", "decode-1"
SMALL_CHUNKS = EngineOptions(prefill_chunk_tokens=16, max_tokens_per_step=16, prefix_cache=False)
Seen = Callable[[LocalCluster], Awaitable[bool]]


async def read(client: httpx.AsyncClient, prompt_tokens: int, chunks: list[str]) -> None:
    prompt = [5 + i % 90 for i in range(prompt_tokens)]
    body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            chunks.append(line)


async def leave(*readers: asyncio.Task[None]) -> None:
    assert not any(reader.done() for reader in readers), "it ended by itself"
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)


async def seconds_until_free(client: httpx.AsyncClient) -> float:
    started = time.monotonic()
    while any((await held_blocks(client)).values()):
        assert time.monotonic() - started < 20, await held_blocks(client)
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def stats(cluster: LocalCluster, name: str) -> EngineStats:
    return await asyncio.to_thread(cluster.engines[name].stats)


async def half_computed(cluster: LocalCluster) -> bool:
    load = (await stats(cluster, PREFILL)).load
    return load.held_blocks > 0 and 0 < load.queued_prefill_tokens < 2000 - 16


async def landing(cluster: LocalCluster) -> bool:
    found = await stats(cluster, DECODE)
    return found.transfer.receiving == 1 and found.load.held_blocks > 0


async def behind_another(cluster: LocalCluster) -> bool:
    return (await stats(cluster, PREFILL)).load.waiting_requests == 2


STATES: dict[str, tuple[list[int], Seen | None]] = {
    "prefill": ([2000], half_computed),
    "hand-off": ([60], landing),
    "queued": ([2000, 1900], behind_another),
    "decode": ([100], None),
}


async def test_a_client_that_leaves_in_any_state_gives_every_block_back(tiny_model: TinyModels) -> None:
    """Slow passes hold each state until the client has left."""
    model = tiny_model(Family.LLAMA)
    async with LocalCluster(model, options=SMALL_CHUNKS) as cluster, http_endpoint(cluster, model) as client:
        for state, (prompts, seen) in STATES.items():
            await asyncio.to_thread(cluster.engines[PREFILL].slow_down, 0.2 if seen else 0.0)
            chunks: list[str] = []
            readers = [asyncio.create_task(read(client, tokens, chunks)) for tokens in prompts]
            if seen is None:
                await cluster.until(lambda seen=chunks: len(seen) >= 10, state)
            else:
                await until_told(lambda seen=seen: seen(cluster), state)
            await leave(*readers)
            await asyncio.to_thread(cluster.engines[PREFILL].slow_down, 0.0)
            assert await seconds_until_free(client) < 1.0, state
        assert set(await held_blocks(client)) == {PREFILL, DECODE}
        await cluster.assert_clean()
