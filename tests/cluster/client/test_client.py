"""Guards the order and completeness of merged streams, and that every end of a request reaches both engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvbaton.cluster.client.api import NoEngines, Overloaded, ShuttingDown
from kvbaton.engine.orders import LegKind
from kvbaton.engine.request import FinishReason, InvalidRequest, SamplingParams
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineLoad, EngineState, Role
from kvbaton.router.placement import RouterConfig
from support.client_support import Stream, cluster, eventually, failure, legs, token, whole
from support.session_support import make_request


async def test_both_legs_are_submitted_with_each_others_address() -> None:
    async with cluster() as c:
        request = make_request(max_tokens=1)
        stream = Stream(c.client, request)
        first, second = await c["p0"].next_submit(), await c["d0"].next_submit()
        assert (first.kind, second.kind) == (LegKind.PREFILL, LegKind.DECODE)
        assert first.request == second.request == request
        assert first.peer == PeerAddress("d0", 1, "127.0.0.1", 1)
        assert second.peer == PeerAddress("p0", 1, "127.0.0.1", 1)
        c["p0"].tokens(request, [0], last=0)
        await stream.end()


async def test_first_token_from_prefill_the_rest_from_decode() -> None:
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0])
        await stream.has(1)
        c["d0"].tokens(request, [1, 2])
        c["d0"].tokens(request, [3], last=3)
        await stream.end()
        assert stream.of() == whole(0, 4)
        assert stream.outputs[-1].finish is FinishReason.LENGTH
        assert stream.outputs[0].cached_tokens == 16
        assert c["p0"].engine.aborts == c["d0"].engine.aborts == []


async def test_decode_overtaking_prefill_waits_for_the_first_token() -> None:
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["d0"].tokens(request, [1])
        c["d0"].tokens(request, [2, 3], last=3)
        await eventually(lambda: c.client.attempts.working_on("r1", 0).decoding)
        assert stream.outputs == []
        c["p0"].tokens(request, [0])
        await stream.end()
        assert stream.of() == whole(0, 4)
        assert stream.batches == 1


async def test_one_frame_is_delivered_as_one_batch() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        request = make_request(max_tokens=3, n=3)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        c["h0"].tokens(request, [0])
        await stream.has(3)
        assert stream.batches == 1
        c["h0"].tokens(request, [1, 2], last=2)
        await stream.end()
        assert stream.batches == 2
        assert [stream.of(s) for s in range(3)] == [whole(s, 3) for s in range(3)]


async def test_duplicates_and_old_epochs_are_dropped() -> None:
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0, 0])
        await stream.has(1)
        old = token(request, 0, 1)
        c["d0"].send(
            token(request, 0, 0),
            type(old)("r1", 7, 0, 1, 666),  # another epoch
            type(old)("r9", 0, 0, 1, 666),  # a request that nobody knows
            type(old)("r1", 0, 5, 1, 666),  # a sample that was not asked for
        )
        c["d0"].tokens(request, [1, 1, 2, 1, 3], last=3)
        await stream.end()
        assert stream.of() == whole(0, 4)
        assert c.client.counters.stale_outputs == 2


async def test_request_that_ends_on_prefill_aborts_its_decode_leg() -> None:
    """Decode would otherwise wait for KV that nobody sends."""
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0], last=0)
        await stream.end()
        assert await c["d0"].aborted() == ("r1", None)
        assert c["p0"].engine.aborts == []


async def test_some_samples_end_on_prefill_and_others_go_on() -> None:
    async with cluster() as c:
        request = make_request(n=2)
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].send(token(request, 0, 0, last=True), token(request, 1, 0))
        c["d0"].send(token(request, 1, 1, last=True))
        await stream.end()
        assert (stream.of(0), stream.of(1)) == (whole(0, 1), whole(1, 2))
        assert c["d0"].engine.aborts == []


@pytest.mark.parametrize("tokens_seen", [0, 1, 2])
async def test_closing_the_stream_aborts_both_legs(tokens_seen: int) -> None:
    """Before the first token, after prefill's, after decode's: a client that leaves must free both engines."""
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        if tokens_seen > 0:
            c["p0"].tokens(request, [0])
        if tokens_seen > 1:
            c["d0"].tokens(request, [1])
        await stream.has(tokens_seen)
        stream.task.cancel()
        await asyncio.wait([stream.task])
        assert await c["p0"].aborted() == ("r1", None)
        assert await c["d0"].aborted() == ("r1", None)


async def test_aclose_aborts_a_request_nobody_reads() -> None:
    async with cluster() as c:
        request = make_request()
        generator = c.client.generate(request)
        reading = asyncio.ensure_future(anext(generator))
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0])
        await reading
        await generator.aclose()
        assert await c["p0"].aborted() == ("r1", None)
        assert await c["d0"].aborted() == ("r1", None)


async def test_stop_ends_what_runs_with_a_reason_and_takes_nothing_new() -> None:
    """Guards against answers that are cut without a word when the endpoint goes down; what has come is given first."""
    async with cluster() as c:
        request = make_request()
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0])
        await stream.has(1)
        c.client.stop()
        with pytest.raises(ShuttingDown, match="the server is shutting down"):
            await stream.end()
        assert stream.of() == whole(0, 1)
        assert await c["p0"].aborted() == ("r1", None)
        assert await c["d0"].aborted() == ("r1", None)
        with pytest.raises(ShuttingDown):
            await anext(c.client.generate(make_request("r2")))
        assert len(c["p0"].engine.submits) == 1


async def test_finish_sample_stops_one_and_the_last_ends_the_stream() -> None:
    async with cluster() as c:
        request = make_request(n=2)
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0])
        await stream.has(2)
        c["d0"].tokens(request, [1])
        await stream.has(4)
        c.client.finish_sample("r1", 0)
        assert await c["d0"].aborted() == ("r1", 0)
        c["d0"].tokens(request, [2])  # was on its way
        await stream.has(5)
        assert (stream.of(0), stream.of(1)) == (whole(0, 2), whole(1, 3))
        c.client.finish_sample("r1", 1)
        c.client.finish_sample("r1", 1)
        c.client.finish_sample("other", 0)
        await stream.end()
        assert await c["d0"].aborted(2) == ("r1", 1)


async def test_engine_error_after_everything_arrived_is_no_failure() -> None:
    """Prefill may complain about a hand-off that decode has completed: the stream must not restart for that."""
    async with cluster() as c:
        request = make_request(max_tokens=3)
        stream = Stream(c.client, request)
        await c["d0"].next_submit()
        await c["p0"].next_submit()
        c["p0"].tokens(request, [0])
        c["d0"].tokens(request, [1])
        await stream.has(2)
        c["p0"].send(failure(request, 0, "ack lost"))
        c["p0"].send(failure(request, 0, "ack lost"))
        c["d0"].tokens(request, [2], last=2)
        await stream.end()
        assert stream.of() == whole(0, 3)
        assert c.client.counters.resumed == 0


async def test_short_prompt_runs_locally_on_decode() -> None:
    async with cluster(router_config=RouterConfig(local_prefill_max_tokens=32)) as c:
        request = make_request(prompt_tokens=31, max_tokens=2)
        stream = Stream(c.client, request)
        submit = await c["d0"].next_submit()
        assert (submit.kind, submit.peer) == (LegKind.LOCAL, None)
        c["d0"].tokens(request, [0, 1], last=1)
        await stream.end()
        assert stream.of() == whole(0, 2)
        assert legs(c["p0"]) == []


async def test_no_engine_is_refused_by_name() -> None:
    async with cluster(0, 0) as c:
        assert not c.client.ready()
        with pytest.raises(NoEngines, match="no engine is ready"):
            await anext(c.client.generate(make_request()))


async def test_overload_is_refused_with_a_time_and_without_work() -> None:
    config = RouterConfig(local_prefill_max_tokens=0, max_queued_prefill_tokens=100, prefill_s_per_token=0.01)
    async with cluster(router_config=config) as c:
        c.router.observe("p0", EngineLoad(queued_prefill_tokens=200))
        with pytest.raises(Overloaded) as refusal:
            await anext(c.client.generate(make_request(prompt_tokens=50)))
        assert refusal.value.retry_after_s == pytest.approx(1.5)
        assert legs(c["p0"], c["d0"]) == []
        assert c.client.counters.refused == 1


async def test_request_id_in_flight_is_refused() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        request = make_request(max_tokens=1)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        with pytest.raises(InvalidRequest, match="in flight"):
            await anext(c.client.generate(request))
        c["h0"].tokens(request, [0], last=0)
        await stream.end()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"request_id": "x" * 225}, "request_id"),
        ({"cache_salt": "x" * 4097}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"prompt": (1, -1)}, "prompt"),
        ({"prompt": (1, 1 << 32)}, "prompt"),
        ({"sampling": SamplingParams(1, stop_token_ids=(1,) * 65_537)}, "stop_token_ids"),
        ({"sampling": SamplingParams(1, logit_bias=((1, 0.0),) * 65_537)}, "logit_bias"),
    ],
)
async def test_what_an_engine_would_call_malformed_never_leaves(changes: dict[str, object], param: str) -> None:
    """One client's odd values must not cost the session that all requests of this ingress share."""
    async with cluster(0, 0, hybrid=1) as c:
        with pytest.raises(InvalidRequest) as refusal:
            await anext(c.client.generate(replace(make_request(), **changes)))  # type: ignore[arg-type]
        assert refusal.value.param == param
        largest = make_request("x" * 224, max_tokens=1)
        stream = Stream(c.client, replace(largest, cache_salt="\u20ac" * 4096))
        submit = await c["h0"].next_submit()
        c["h0"].send(failure(submit.request, 0, "again"))
        again = await c["h0"].next_submit(2)  # the longest id still fits with a resume's suffix
        c["h0"].tokens(again.request, [0], last=0)
        await stream.end()


async def test_ready_needs_both_roles_while_both_are_listed() -> None:
    async with cluster(prefill=1, decode=0) as c:
        assert c.client.ready()  # nobody else is listed: it serves alone
        listed = c["p0"].info
        starting = replace(listed, engine_id="d0", role=Role.DECODE, state=EngineState.STARTING)
        await c.list(starting)
        assert not c.client.ready()
        await c.add("d0", Role.DECODE)
        assert c.client.ready()
