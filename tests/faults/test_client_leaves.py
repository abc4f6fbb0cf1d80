"""A client that closes its connection: every block is back on both engines within a second, as `/metrics` tells it."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from kvbaton.engine.tiny import Family
from support.http_endpoint import MODEL_ID, held_blocks, http_endpoint
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import TinyModels

pytestmark = pytest.mark.ucx

# Chunks of 16 tokens make the prefill of 2,000 take a good second, so that a client can leave in the middle of it.
SLOW = EngineOptions(prefill_chunk_tokens=16, max_tokens_per_step=16, prefix_cache=False)


def body(prompt_tokens: int, max_tokens: int = 2000) -> dict[str, object]:
    prompt = [5 + i % 90 for i in range(prompt_tokens)]
    return {"model": MODEL_ID, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


async def leave_after(client: httpx.AsyncClient, seconds: float | None, prompt_tokens: int) -> None:
    """Disconnect `seconds` after sending, or with None as soon as ten chunks have come."""

    async def read() -> None:
        chunks = 0
        async with client.stream("POST", "/v1/completions", json=body(prompt_tokens)) as response:
            async for _ in response.aiter_lines():
                chunks += 1
                if seconds is None and chunks == 10:
                    return

    task = asyncio.create_task(read())
    if seconds is None:
        await task
        return
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.wait([task])


async def seconds_until_free(client: httpx.AsyncClient) -> float:
    started = time.monotonic()
    while any((await held_blocks(client)).values()):
        assert time.monotonic() - started < 20, await held_blocks(client)
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def test_client_leaves_in_every_state(tiny_model: TinyModels) -> None:
    """Queued behind another prompt, in prefill, at the hand-off, and while decoding."""
    model = tiny_model(Family.LLAMA)
    async with LocalCluster(model, options=SLOW) as cluster, http_endpoint(cluster, model) as client:
        for state, seconds, tokens in (("prefill", 0.3, 2000), ("decode", None, 100), ("hand-off", 0.1, 60)):
            await leave_after(client, seconds, tokens)
            assert await seconds_until_free(client) < 1.0, state
        busy = asyncio.create_task(leave_after(client, 1.5, 2000))
        await asyncio.sleep(0.1)
        await leave_after(client, 0.2, 1900)  # queued: the other one's chunks run first
        await busy
        assert await seconds_until_free(client) < 1.0, "queued"
        assert set(await held_blocks(client)) == {"prefill-0", "decode-1"}
        await cluster.assert_clean()
