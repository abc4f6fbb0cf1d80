"""Guards resume: whatever ends an engine's work on a request, the client sees each token once and none is missing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvbaton.cluster.client.api import EngineLost
from kvbaton.cluster.client.client import ClientConfig
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineState, Role
from kvbaton.router.placement import RouterConfig
from support.client_support import LOAD, Cluster, Node, Stream, cluster, eventually, failure, token, token_at, whole
from support.session_support import make_request, until


async def started(c: Cluster, request: Request, prefill: str = "p0", decode: str = "d0") -> Stream:
    stream = Stream(c.client, request)
    await c[prefill].next_submit()
    await c[decode].next_submit()
    return stream


async def test_decode_lost_in_the_middle_goes_on_elsewhere_exactly() -> None:
    async with cluster(prefill=1, decode=2) as c:
        request = make_request(max_tokens=5)
        stream = Stream(c.client, request)
        await c["p0"].next_submit()
        dying, other = await c.split("d0", "d1")
        c["p0"].tokens(request, [0])
        dying.tokens(request, [1, 2])
        await stream.has(3)
        await dying.kill()
        again = await other.next_submit()
        assert again.kind is LegKind.DECODE
        assert again.request.request_id == "r1~1.0"
        assert again.request.epoch == 1
        assert again.request.sample_indices == (0,)
        assert again.request.emitted == tuple(token_at(0, i) for i in range(3))
        assert (await c["p0"].next_submit(2)).request == again.request
        assert await c["p0"].aborted() == ("r1", None)
        c["p0"].tokens(again.request, [3])
        other.tokens(again.request, [4], last=4)
        await stream.end()
        assert stream.of() == whole(0, 5)
        assert {output.request_id for output in stream.outputs} == {"r1"}
        assert [output.cached_tokens for output in stream.outputs] == [16, None, None, None, None]
        assert c.client.counters.resumed == 1


async def test_prefill_lost_before_the_first_token_runs_on_another() -> None:
    async with cluster(prefill=2, decode=1) as c:
        request = make_request(max_tokens=2)
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        dying, other = await c.split("p0", "p1")
        await dying.kill()
        again = await other.next_submit()
        assert (again.kind, again.request.emitted, again.request.epoch) == (LegKind.PREFILL, (), 1)
        assert await c["d0"].aborted() == ("r1", None)
        address = other.info
        assert (await c["d0"].next_submit(2)).peer == PeerAddress(address.engine_id, 1, address.host, address.kv_port)
        other.tokens(again.request, [0])
        c["d0"].tokens(again.request, [1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)


async def test_prefill_lost_after_decode_began_changes_nothing() -> None:
    async with cluster() as c:
        request = make_request(max_tokens=3)
        stream = await started(c, request)
        c["p0"].tokens(request, [0])
        c["d0"].tokens(request, [1])
        await stream.has(2)
        await c["p0"].kill()
        await eventually(lambda: c.router.view("p0") is None)
        c["d0"].tokens(request, [2], last=2)
        await stream.end()
        assert stream.of() == whole(0, 3)
        assert c.client.counters.resumed == 0


async def test_prefill_lost_with_a_first_token_that_decode_overtook() -> None:
    """The hand-off was done, but the first token died with prefill: only a resume can bring it back."""
    async with cluster() as c:
        request = make_request(max_tokens=3)
        stream = await started(c, request)
        c["d0"].tokens(request, [1])
        await eventually(lambda: c.client.attempts.working_on("r1", 0).decoding)
        await c["p0"].kill()
        again = await c["d0"].next_submit(2)
        assert (again.kind, again.request.emitted) == (LegKind.LOCAL, ())
        assert await c["d0"].aborted() == ("r1", None)
        c["d0"].tokens(again.request, [0, 1, 2], last=2)
        await stream.end()
        assert stream.of() == whole(0, 3)


async def test_last_prefill_lost_serves_on_decode_alone() -> None:
    async with cluster() as c:
        request = make_request(max_tokens=2)
        stream = await started(c, request)
        await c["p0"].kill()
        again = await c["d0"].next_submit(2)
        assert again.kind is LegKind.LOCAL
        c["d0"].tokens(again.request, [0, 1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)


async def test_engine_error_is_resumed_without_the_engines_that_failed() -> None:
    async with cluster(prefill=2, decode=2) as c:
        request = make_request(max_tokens=2)
        stream = Stream(c.client, request)
        nodes = [c[name] for name in ("p0", "p1", "d0", "d1")]
        await eventually(lambda: not (sum(len(node.engine.submits) for node in nodes) < 2))
        used = [node for node in nodes if node.engine.submits]
        unused = [node for node in nodes if not node.engine.submits]
        used[1].send(failure(request, 0, "hand-off failed: peer closed"))
        for node in unused:
            await node.next_submit()
        for node in used:
            assert await node.aborted() == ("r1", None)
        prefill, decode = unused
        again = prefill.engine.submits[0][1].request
        prefill.tokens(again, [0])
        decode.tokens(again, [1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)


async def test_failed_hand_off_of_the_only_pair_is_retried_without_transfer() -> None:
    async with cluster() as c:
        request = make_request(max_tokens=2)
        stream = await started(c, request)
        c["p0"].tokens(request, [0])
        c["d0"].send(failure(request, 0, "hand-off failed: checksum"))
        again = await c["d0"].next_submit(2)
        assert again.kind is LegKind.LOCAL
        c["d0"].tokens(again.request, [len(again.request.emitted), 1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)


@pytest.mark.parametrize("gap", [[2], [1, 3], [1, 2, 4]])
async def test_gap_is_an_error_that_a_resume_closes(gap: list[int]) -> None:
    async with cluster() as c:
        request = make_request(max_tokens=6)
        stream = await started(c, request)
        c["p0"].tokens(request, [0])
        await stream.has(1)
        c["d0"].tokens(request, gap)
        again = await c["d0"].next_submit(2)
        received = len(gap)
        assert again.request.emitted == tuple(token_at(0, i) for i in range(received))
        c["d0"].tokens(again.request, range(received, 6), last=5)
        await stream.end()
        assert stream.of() == whole(0, 6)


async def test_gap_behind_a_first_token_that_is_still_owed() -> None:
    async with cluster() as c:
        request = make_request(max_tokens=4)
        stream = await started(c, request)
        c["d0"].tokens(request, [1, 3])
        again = await c["d0"].next_submit(2)
        assert again.request.emitted == ()
        c["p0"].tokens(request, [0])  # of the attempt that was given up: must not be taken
        c["d0"].tokens(again.request, range(4), last=3)
        await stream.end()
        assert stream.of() == whole(0, 4)


async def test_each_unfinished_sample_is_resumed_with_its_own_tokens() -> None:
    async with cluster(0, 0, hybrid=2) as c:
        request = make_request(max_tokens=4, n=3)
        stream = Stream(c.client, request)
        dying, other = await c.split("h0", "h1")
        dying.send(token(request, 0, 0, last=True), token(request, 1, 0), token(request, 2, 0), token(request, 2, 1))
        await stream.has(4)
        await dying.kill()
        one, two = (await other.next_submit(1)).request, (await other.next_submit(2)).request
        assert (one.sample_indices, one.emitted) == ((1,), (token_at(1, 0),))
        assert (two.sample_indices, two.emitted) == ((2,), (token_at(2, 0), token_at(2, 1)))
        assert one.request_id != two.request_id
        assert one.sampling == request.sampling
        other.tokens(two, [2, 3], last=3)
        other.tokens(one, [1, 2, 3], last=3)
        await stream.end()
        assert [stream.of(s) for s in range(3)] == [whole(0, 1), whole(1, 4), whole(2, 4)]
        assert c.client.counters.resumed == 2


async def test_one_sample_that_fails_leaves_the_others_running() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        request = make_request(max_tokens=2, n=2)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        c["h0"].send(token(request, 0, 0), failure(request, 1, "no blocks"))
        again = (await c["h0"].next_submit(2)).request
        assert again.sample_indices == (1,)
        assert await c["h0"].aborted() == ("r1", 1)
        c["h0"].send(token(request, 0, 1, last=True), token(again, 1, 0), token(again, 1, 1, last=True))
        await stream.end()
        assert (stream.of(0), stream.of(1)) == (whole(0, 2), whole(1, 2))


async def test_resumes_are_bounded_and_the_last_reason_is_told() -> None:
    async with cluster(0, 0, hybrid=1, client_config=ClientConfig(max_resumes=2)) as c:
        stream = Stream(c.client, make_request())
        for number in (1, 2, 3):
            submit = await c["h0"].next_submit(number)
            c["h0"].send(failure(submit.request, 0, f"broken {number}"))
        with pytest.raises(EngineLost, match="resumed 2 times; last failure: engine h0: broken 3"):
            await stream.end()
        assert len(c["h0"].engine.submits) == 3


async def test_tokens_that_arrived_are_read_before_the_error() -> None:
    async with cluster(0, 0, hybrid=1, client_config=ClientConfig(max_resumes=0)) as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        c["h0"].send(token(request, 0, 0), failure(request, 0, "broken"))
        with pytest.raises(EngineLost):
            await stream.end()
        assert stream.of() == whole(0, 1)


async def test_without_any_engine_a_begun_request_waits_for_the_replacement() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        request = make_request(max_tokens=3)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        c["h0"].tokens(request, [0])
        await stream.has(1)
        await c["h0"].kill()
        await eventually(lambda: not (c.router.engines))
        reborn = await c.add("h0", Role.HYBRID, generation=2)
        again = (await reborn.next_submit()).request
        assert again.emitted == (token_at(0, 0),)
        reborn.tokens(again, [1, 2], last=2)
        await stream.end()
        assert stream.of() == whole(0, 3)


async def test_the_wait_for_an_engine_has_an_end() -> None:
    async with cluster(0, 0, hybrid=1, client_config=ClientConfig(park_s=0.05)) as c:
        stream = Stream(c.client, make_request())
        await c["h0"].next_submit()
        await c["h0"].kill()
        with pytest.raises(
            EngineLost, match=r"no engine came within 0.05 s; last failure: engine h0: closed by the peer"
        ):
            await stream.end()


async def test_leaving_while_parked_leaves_nothing() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        stream = Stream(c.client, make_request())
        await c["h0"].next_submit()
        await c["h0"].kill()
        await eventually(lambda: not (c.router.engines))
        stream.task.cancel()
        await asyncio.wait([stream.task])
        reborn = await c.add("h0", Role.HYBRID, generation=2)
        assert reborn.engine.submits == []


@pytest.mark.parametrize("state", [EngineState.UNHEALTHY, EngineState.DEAD])
async def test_engine_that_the_registry_gives_up_is_left_at_once(state: EngineState) -> None:
    """A hung engine keeps its socket open: the list decides."""
    async with cluster(0, 0, hybrid=2) as c:
        stream = Stream(c.client, request := make_request(max_tokens=1))
        hung, other = await c.split("h0", "h1")
        await c.list(replace(hung.info, state=state, reason="no step for 5 s"))
        again = (await other.next_submit()).request
        assert again.prompt == request.prompt
        other.tokens(again, [0], last=0)
        await stream.end()
        await until(hung.engine.changed, lambda: bool(hung.engine.lost))


async def test_draining_engine_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with cluster(0, 0, hybrid=2) as c:
        stream = Stream(c.client, request := make_request(max_tokens=2))
        draining, other = await c.split("h0", "h1")
        await c.list(replace(draining.info, state=EngineState.DRAINING))
        for number in range(3):
            late = Stream(c.client, new := make_request(f"late-{number}", max_tokens=1))
            await other.next_submit(number + 1)
            other.tokens(new, [0], last=0)
            await late.end()
        draining.tokens(request, [0, 1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)


class Unreliable:
    """A script that makes every token at once, but fails, repeats, skips or cuts the connection at random places."""

    def __init__(self, node: Node, rng: random.Random) -> None:
        self._node = node
        self._rng = rng

    def __call__(self, session_id: int, submit: Submit) -> None:
        request = submit.request
        start = len(request.emitted) + (submit.kind is LegKind.DECODE)
        stop = start + 1 if submit.kind is LegKind.PREFILL else request.sampling.max_tokens
        outputs = [out for sample in request.sample_indices for out in self._sample(request, sample, start, stop)]
        cut = self._rng.random() < 0.05
        self._node.server.publish(session_id, outputs[: len(outputs) // 2] if cut else outputs, LOAD)
        if cut:
            self._node.server._sessions[session_id].connection.close("dice")

    def _sample(self, request: Request, sample: int, start: int, stop: int) -> Iterator[TokenOutput]:
        for index in range(start, stop):
            # The last one is never skipped: no connection loses its end in silence.
            roll = self._rng.random() if index < stop - 1 else 1.0
            if roll < 0.02:
                yield failure(request, sample, "dice")
                return
            if roll < 0.03:
                continue
            for _ in range(1 + (roll < 0.08)):
                yield token(request, sample, index, last=index == request.sampling.max_tokens - 1)


@pytest.mark.parametrize("seed", [7, 8, 9])
async def test_random_faults_never_lose_or_repeat_a_token(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        make_request(f"r{i}", prompt_tokens=rng.randint(1, 40), max_tokens=rng.randint(1, 30), n=rng.randint(1, 3))
        for i in range(60)
    ]
    config = ClientConfig(max_resumes=100)
    router_config = RouterConfig(local_prefill_max_tokens=8)
    async with cluster(2, 2, hybrid=1, client_config=config, router_config=router_config) as c:
        for node in c.nodes.values():
            node.engine.on_submit = Unreliable(node, rng)
        streams = [Stream(c.client, request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            await stream.end()
            for sample in request.sample_indices:
                assert stream.of(sample) == whole(sample, request.sampling.max_tokens), f"{request.request_id}/{sample}"
            ends = [output.sample for output in stream.outputs if output.finish is FinishReason.LENGTH]
            assert sorted(ends) == list(request.sample_indices)
        assert c.client.counters.resumed > 20
