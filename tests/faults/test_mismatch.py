"""Engines whose KV does not mean the same: the hand-off is refused by the field's name, the client is still served."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import TinyModels, oracle_tokens, prompts

pytestmark = pytest.mark.ucx


async def test_block_size_mismatch_is_named_and_survived(
    tiny_model: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards corrupt KV under HTTP 200: blocks of 16 tokens must never land in a pool of blocks of 32."""
    model = tiny_model(Family.LLAMA)
    prompt = prompts()[5]
    expected = await asyncio.to_thread(oracle_tokens, model, prompt, 64)
    async with LocalCluster(model, special={"decode-1": EngineOptions(block_size=32)}) as cluster:
        request = Request("r", tuple(prompt), SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        assert await cluster.tokens(request) == {0: expected}
        assert cluster.client.counters.resumed == 1, "served by one engine after the refusal"
        assert "block_size" in caplog.text
        assert "16" in caplog.text
        assert "32" in caplog.text
        await cluster.assert_clean()
        assert cluster.engines["decode-1"].stats().transfer.bytes_received == 0
