"""Prefill and decode in two processes, KV over UCX: the same tokens as transformers and as one engine alone."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import Role
from support.http_endpoint import MODEL_ID, http_endpoint
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import FAMILIES, TinyModels, oracle_tokens, prompts

pytestmark = pytest.mark.ucx


def greedy(name: str, prompt: list[int], max_tokens: int = 64) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize("family", FAMILIES)
async def test_split_equals_the_oracle(tiny_model: TinyModels, family: Family) -> None:
    """One by one, then sixteen at once; the blocks that landed are compared by hash and position."""
    model = tiny_model(family)
    oracle = {i: oracle_tokens(model, prompt) for i, prompt in enumerate(prompts())}  # blocks the loop: before sessions
    async with LocalCluster(model) as cluster:
        prefill, decode = (cluster.engines[name] for name in ("prefill-0", "decode-1"))
        for i, prompt in enumerate(prompts()):
            assert await cluster.tokens(greedy(f"p{i}", prompt)) == {0: oracle[i]}, f"prompt {i}"
        await cluster.assert_clean()
        assert cluster.client.counters.placed_pairs == len(prompts())
        for prompt in prompts():
            assert decode.blocks_of(prompt) == prefill.blocks_of(prompt)
            assert len(decode.blocks_of(prompt)) == len(prompt) // 16
        wanted = [(i, length) for length in (64, 17, 40) for i in oracle][:16]
        answers = await asyncio.gather(
            *(cluster.tokens(greedy(f"c{k}", prompts()[i], n)) for k, (i, n) in enumerate(wanted))
        )
        for (i, length), answer in zip(wanted, answers, strict=True):
            assert answer == {0: oracle[i][:length]}
        await cluster.assert_clean()
        stats = prefill.stats()
        assert stats.transfer.handoffs_acked == len(prompts()) + 16
        async with http_endpoint(cluster, model) as http:
            for i, prompt in enumerate(prompts()):
                body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
                reply = await http.post("/v1/completions", json=body | {"return_token_ids": True})
                assert reply.json()["choices"][0]["token_ids"] == oracle[i]
        assert stats.transfer.bytes_sent > 0


async def test_split_with_steps_that_overlap(tiny_model: TinyModels) -> None:
    """Sixteen at once; then the same while others are read for a few tokens and left."""
    model = tiny_model(Family.LLAMA)
    oracle = [oracle_tokens(model, prompt) for prompt in prompts()]
    wanted = [(i, length) for length in (64, 17, 40) for i in range(len(oracle))][:16]
    async with LocalCluster(model, options=EngineOptions(pipelined="on")) as cluster:
        for turn in range(2):
            left = [asyncio.create_task(_leave(cluster, greedy(f"left-{i}", prompts()[i]), i)) for i in range(turn * 7)]
            requests = [greedy(f"r{turn}-{k}", prompts()[i], n) for k, (i, n) in enumerate(wanted)]
            answers = await asyncio.gather(*map(cluster.tokens, requests))
            assert answers == [{0: oracle[i][:length]} for i, length in wanted]
            await asyncio.gather(*left)
        await cluster.assert_clean()


async def _leave(cluster: LocalCluster, request: Request, after: int) -> None:
    """Read a request until it has sent `after` frames."""
    stream = cluster.client.generate(request)
    for _ in range(after):
        await anext(stream)
    await stream.aclose()


async def test_split_with_preemption_on_decode(tiny_model: TinyModels) -> None:
    """A decode pool too small for its streams recomputes some of them; tokens stay."""
    model = tiny_model(Family.LLAMA)
    oracle = [{0: oracle_tokens(model, prompt)} for prompt in prompts()]
    async with LocalCluster(model, options=EngineOptions(kv_memory_bytes=26 * 16384, prefix_cache=False)) as cluster:
        answers = await asyncio.gather(*(cluster.tokens(greedy(f"r{i}", p)) for i, p in enumerate(prompts())))
        assert answers == oracle
        assert cluster.engines["decode-1"].stats().counters.preemptions > 0
        await cluster.assert_clean()


async def test_cached_tokens_are_reported_and_not_sent_again(tiny_model: TinyModels) -> None:
    model = tiny_model(Family.QWEN3)
    prompt = max(prompts(), key=len)
    async with LocalCluster(model) as cluster:
        cold = await cluster.outputs(greedy("cold", prompt))
        sent = cluster.engines["prefill-0"].stats().transfer.bytes_sent
        warm = await cluster.outputs(greedy("warm", prompt))
        again = cluster.engines["prefill-0"].stats().transfer.bytes_sent - sent
        assert [o.cached_tokens for o in (cold[0], warm[0])] == [0, (len(prompt) - 1) // 16 * 16]
        assert again * (len(prompt) // 16) <= sent, "only the partial tail block travels the second time"
        assert [o.token_id for o in warm] == [o.token_id for o in cold]


async def test_seeded_samples_are_equal_hybrid_and_split(tiny_model: TinyModels) -> None:
    """Guards sampler state lost at the hand-off: n samples, penalties, logprobs."""
    model = tiny_model(Family.QWEN2)
    params = [
        SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=7, n=4),
        SamplingParams(max_tokens=24, temperature=1.2, min_p=0.02, seed=8, repetition_penalty=1.2),
        SamplingParams(max_tokens=24, temperature=0.7, top_k=20, seed=9, frequency_penalty=0.8, presence_penalty=0.3),
    ]
    requests = [
        Request(f"s{i}", tuple(prompts()[i + 2]), sampling, tuple(range(sampling.n)))
        for i, sampling in enumerate(params)
    ]
    async with LocalCluster(model) as split:
        drawn = await asyncio.gather(*(split.tokens(request) for request in requests))
        await split.assert_clean()
    async with LocalCluster(model, roles=(Role.HYBRID,)) as hybrid:
        alone = [await hybrid.tokens(request) for request in requests]
        await hybrid.assert_clean()
    assert drawn == alone
    assert len({tuple(tokens) for tokens in drawn[0].values()}) == 4


async def test_request_that_ends_with_its_first_token_never_travels(tiny_model: TinyModels) -> None:
    model = tiny_model(Family.LLAMA)
    prompt = prompts()[4]
    first = oracle_tokens(model, prompt)[:1]
    async with LocalCluster(model) as cluster:
        assert await cluster.tokens(greedy("one", prompt, 1)) == {0: first}
        await cluster.assert_clean()
        assert cluster.engines["prefill-0"].stats().transfer.handoffs_acked == 0
