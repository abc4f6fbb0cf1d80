"""`Dispatch` over recorded sessions and a hand-moved clock: placing, resuming, parking, giving up, and every end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec import structs

from kvbaton.cluster.client.api import Cancelled, DeadlineExceeded, EngineLost, NoEngines, Overloaded
from kvbaton.cluster.client.live_request import LiveRequest
from kvbaton.cluster.client.settings import ClientConfig
from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.orders import LegKind, Migrated, MigrationWanted
from kvbaton.engine.request import ErrorCause, Request, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineLoad
from support.client_support import failure, token, token_at
from support.dispatch_bench import Bench, read_now
from support.session_support import make_request


def tokens(request: Request, *indices: int, sample: int = 0, last: int | None = None):  # type: ignore[no-untyped-def]
    return [token(request, sample, index, index == last) for index in indices]


async def read(live: LiveRequest) -> list[int]:
    """Indices of what has come, maybe none."""
    return [output.index for output in await read_now(live) or []]


async def read_all(live: LiveRequest) -> None:
    """To the end; raises what the stream ends with."""
    while await read_now(live):
        pass


# ---- placing ----


async def test_both_legs_are_sent_with_each_others_address_and_booked() -> None:
    bench = Bench("p0", "d0")
    request = make_request(prompt_tokens=7)
    live = bench.begin(request)
    (prefill,), (decode,) = bench["p0"].submits, bench["d0"].submits
    assert (prefill.kind, prefill.peer) == (LegKind.PREFILL, PeerAddress("d0", 1, "127.0.0.1", 1))
    assert (decode.kind, decode.peer) == (LegKind.DECODE, PeerAddress("p0", 1, "127.0.0.1", 1))
    assert prefill.request == decode.request == request
    view = bench.router.view("p0")
    assert view is not None
    assert view.own_prefill_tokens == 7
    bench.say("p0", *tokens(request, 0))
    assert view.own_prefill_tokens == 0, "its prompt is computed"
    bench.say("d0", *tokens(request, 1, 2, 3, last=3))
    assert await read(live) == [0, 1, 2, 3]
    assert (bench["p0"].aborts, bench["d0"].aborts) == ([], [])
    assert (bench.counters.placed_pairs, bench.counters.placed_local) == (1, 0)
    bench.assert_empty()


async def test_what_is_refused_leaves_nothing() -> None:
    with pytest.raises(NoEngines, match="no engine is ready"):
        Bench().begin(make_request())
    bench = Bench("p0", "d0")
    bench.router.observe("p0", EngineLoad(queued_prefill_tokens=1 << 20))
    with pytest.raises(Overloaded):
        bench.begin(replace(make_request(), timeout_s=5.0))
    assert bench["p0"].submits == bench["d0"].submits == []
    assert bench.counters.refused == 1
    bench.assert_empty()


@pytest.mark.parametrize("engines", [("h0",), ("p0", "d0")])
async def test_what_is_too_much_for_the_engines_is_refused_before_anything_is_sent(engines: tuple[str, ...]) -> None:
    """Guards a burst of which engines refuse most: each refusal would count as a failure of the engine."""
    bench = Bench()
    for name in engines:
        bench.add(name, max_requests=2)
    live = [bench.begin(make_request(f"r{n}")) for n in range(2)]
    for n in range(2, 12):
        with pytest.raises(Overloaded, match="every engine is busy: 2 requests are there") as refused:
            bench.begin(make_request(f"r{n}"))
        assert refused.value.retry_after_s > 0
    assert [len(bench[name].submits) for name in engines] == [2] * len(engines)
    assert (bench.counters.refused, bench.counters.lost, bench.counters.resumed) == (10, 0, 0)
    bench.dispatch.end(live[0])
    live[0] = bench.begin(make_request("r12"))
    for one in live:
        bench.dispatch.end(one)
    bench.assert_empty()


def full(request: Request) -> TokenOutput:
    return structs.replace(failure(request, 0, "engine queue is full"), cause=ErrorCause.QUEUE_FULL)


async def test_an_engine_that_others_have_filled_is_no_failure() -> None:
    """Other ingresses send there too: the router's own book cannot know. Another engine is tried, without a resume."""
    bench = Bench("h0", "h1", config=ClientConfig(max_resumes=0))
    live = bench.begin(make_request())
    used, other = ("h0", "h1") if bench["h0"].submits else ("h1", "h0")
    bench.say(used, full(make_request()))
    (again,) = bench[other].submits
    bench.say(other, *tokens(again.request, 0, last=0))
    assert await read(live) == [0]
    assert (bench.counters.resumed, bench.counters.lost, bench.counters.refused) == (0, 0, 0)
    bench.assert_empty()


async def test_without_room_anywhere_a_new_request_waits_shortly_and_is_refused() -> None:
    bench = Bench("p0", "d0", config=ClientConfig(max_resumes=0, full_wait_s=1.0))
    live = bench.begin(make_request())
    bench.say("d0", full(make_request()))
    assert live.parked == [0]
    bench.timers.advance(0.6)
    bench.observe("d0")
    again = bench["d0"].submits[1].request
    bench.say("d0", full(again))
    bench.timers.advance(0.3)
    assert not live.over
    bench.timers.advance(0.2)
    with pytest.raises(Overloaded, match="the queue of every engine is full") as refused:
        await read_now(live)
    assert refused.value.retry_after_s > 0
    assert (bench.counters.resumed, bench.counters.lost, bench.counters.refused) == (0, 0, 1)
    bench.assert_empty()


async def test_decode_takes_the_prompt_that_prefill_has_no_room_for() -> None:
    bench = Bench("p0", "d0", config=ClientConfig(max_resumes=0))
    live = bench.begin(make_request())
    bench.say("p0", full(make_request()))
    assert [submit.kind for submit in bench["d0"].submits] == [LegKind.DECODE, LegKind.LOCAL]
    bench.dispatch.end(live)
    assert (bench.counters.resumed, bench.counters.lost) == (0, 0)
    bench.assert_empty()


async def test_a_stream_that_had_begun_waits_for_room_as_long_as_engines_work() -> None:
    bench = Bench("p0", "d0", config=ClientConfig(max_resumes=0, park_s=30.0))
    live = bench.begin(make_request())
    bench.say("p0", *tokens(make_request(), 0))
    bench.say("d0", full(make_request()))
    bench.timers.advance(100.0)
    assert (live.parked, live.over) == ([0], False)
    bench.observe("d0")
    again = bench["d0"].submits[1].request
    assert again.emitted == (token_at(0, 0),)
    bench.dispatch.end(live)
    assert (bench.counters.resumed, bench.counters.lost, bench.counters.refused) == (0, 0, 0)
    bench.assert_empty()


async def test_a_resume_waits_for_room() -> None:
    """The client has tokens: it must neither be told to come again, nor be sent where it would be refused."""
    bench = Bench()
    bench.add("h0", max_requests=1)
    first = bench.begin(make_request("r1"))
    bench.add("h1", max_requests=1)
    second = bench.begin(make_request("r2"))
    bench.say("h1", *tokens(make_request("r2"), 0))
    bench.lose("h1")
    assert (second.parked, len(bench["h0"].submits)) == ([0], 1)
    with pytest.raises(Overloaded):
        bench.begin(make_request("r3"))
    bench.dispatch.end(first)
    bench.say("h0")  # the frame that says so
    (_, again) = bench["h0"].submits
    assert (again.request.emitted, second.parked) == ((token_at(0, 0),), [])
    bench.dispatch.end(second)
    bench.assert_empty()


@pytest.mark.parametrize("ends", [True, False])
async def test_decode_has_a_prompt_when_it_decodes_and_not_before(ends: bool) -> None:
    bench = Bench("p0", "d0")
    request = make_request(prompt_tokens=40)
    live = bench.begin(request)
    bench.say("p0", *tokens(request, 0, last=0 if ends else None))
    if not ends:
        bench.say("d0", *tokens(request, 1))
    assert bench.router.index.match("d0", block_hashes(request.prompt, 16), bench.timers.now()) == (0 if ends else 2)
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_a_session_that_has_just_gone_is_as_good_as_lost() -> None:
    """Guards the moment between a broken socket and the word of it: the router still counts on that engine."""
    bench = Bench("h0")
    bench["h0"].connected = False
    live = bench.begin(make_request())
    assert live.parked == [0]
    assert live.last_reason == "engine h0: no session"
    bench.lose("h0")
    (again,) = bench.add("h0", generation=2).submits
    assert again.request.request_id == "r1~2.0"
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_stale_outputs_are_counted_and_dropped() -> None:
    bench = Bench("h0")
    request = make_request()
    live = bench.begin(request)
    bench.say("h0", *tokens(replace(request, epoch=7), 0), *tokens(make_request("other"), 0), *tokens(request, 0))
    assert await read(live) == [0]
    assert bench.counters.stale_outputs == 2
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_a_request_that_ends_with_its_first_token_tells_decode() -> None:
    """Guards decode, which would wait for KV that nobody sends."""
    bench = Bench("p0", "d0")
    request = make_request()
    bench.begin(request)
    bench.say("p0", *tokens(request, 0, last=0))
    assert (bench["p0"].aborts, bench["d0"].aborts) == ([], [("r1", None)])
    bench.assert_empty()


# ---- resuming ----


async def test_each_failure_is_resumed_under_the_next_number() -> None:
    bench = Bench("h0")
    request = make_request(n=2, max_tokens=6)
    live = bench.begin(request)
    bench.say("h0", *tokens(request, 0), *tokens(request, 0, sample=1), failure(request, 1, "broken"))
    assert bench["h0"].aborts == [("r1", 1)], "the other sample goes on"
    second = bench["h0"].submits[1].request
    assert (second.request_id, second.epoch, second.sample_indices) == ("r1~1.1", 1, (1,))
    assert second.emitted == (token_at(1, 0),)
    bench.say("h0", *tokens(second, 1, sample=1), failure(second, 1, "broken again"))
    third = bench["h0"].submits[2].request
    assert (third.request_id, third.emitted) == ("r1~2.1", (token_at(1, 0), token_at(1, 1)))
    bench.say("h0", *tokens(second, 2, sample=1))  # of the attempt before
    bench.say("h0", *tokens(request, 1, last=1), *tokens(third, 2, sample=1, last=2))
    assert [(output.request_id, output.sample, output.index) for output in await read_now(live) or []] == [
        ("r1", 0, 0),
        ("r1", 1, 0),
        ("r1", 1, 1),
        ("r1", 0, 1),
        ("r1", 1, 2),
    ]
    assert live.over
    assert (bench.counters.resumed, bench.counters.stale_outputs) == (2, 1)
    bench.assert_empty()


async def test_a_gap_is_resumed_on_other_engines() -> None:
    bench = Bench("p0", "d0", "d1")
    request = make_request()
    live = bench.begin(request)
    used, other = ("d0", "d1") if bench["d0"].submits else ("d1", "d0")
    bench.say("p0", *tokens(request, 0))
    bench.say(used, *tokens(request, 2))
    assert live.last_reason == "token 2 came where 1 was next"
    assert bench[used].aborts == bench["p0"].aborts == [("r1", None)]
    (again,) = bench[other].submits
    assert again.request.emitted == (token_at(0, 0),)
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_decode_lost_is_resumed_and_prefill_lost_later_is_not() -> None:
    bench = Bench("p0", "p1", "d0")
    request = make_request()
    live = bench.begin(request)
    used, other = ("p0", "p1") if bench["p0"].submits else ("p1", "p0")
    bench.say(used, *tokens(request, 0))
    bench.say("d0", *tokens(request, 1))
    bench.lose(used)
    assert bench.counters.resumed == 0
    bench.lose("d0")
    (again,) = bench[other].submits
    assert (again.kind, again.request.emitted) == (LegKind.LOCAL, (token_at(0, 0), token_at(0, 1)))
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_given_up_when_resumed_too_often() -> None:
    bench = Bench("h0", config=ClientConfig(max_resumes=2))
    live = bench.begin(make_request())
    for number in range(3):
        bench.say("h0", failure(bench["h0"].submits[number].request, 0, f"broken {number}"))
    with pytest.raises(EngineLost, match="resumed 2 times; last failure: engine h0: broken 2"):
        await read_now(live)
    assert len(bench["h0"].submits) == 3
    assert bench.counters.lost == 1
    bench.assert_empty()


async def test_a_resume_is_not_refused_for_load() -> None:
    """It was admitted before: a client that has tokens must not be told to come again."""
    bench = Bench("h0", "h1")
    request = make_request()
    live = bench.begin(request)
    for name in ("h0", "h1"):
        bench.router.observe(name, EngineLoad(queued_prefill_tokens=1 << 20))
    bench.lose("h0" if bench["h0"].submits else "h1")
    assert len(bench["h0"].submits) == len(bench["h1"].submits) == 1
    bench.dispatch.end(live)
    bench.assert_empty()


# ---- parking ----


def parked(bench: Bench, request: Request) -> LiveRequest:
    """A request with one token that has lost its only engine, h0."""
    live = bench.begin(request)
    bench.say("h0", *tokens(request, 0))
    bench.lose("h0")
    assert live.parked == [0]
    return live


async def test_a_parked_sample_goes_to_the_engine_that_comes() -> None:
    bench = Bench("h0")
    live = parked(bench, make_request())
    bench.timers.advance(29.9)
    (again,) = bench.add("h0", generation=2).submits
    assert (again.request.emitted, live.parked) == ((token_at(0, 0),), [])
    bench.timers.advance(100.0)  # the wait is over, but nobody waits
    assert not live.over
    bench.say("h0", *tokens(again.request, 1, last=1))
    assert await read(live) == [0, 1]
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_samples_of_a_request_wait_together() -> None:
    """Guards a request whose wait would begin anew with each sample."""
    bench = Bench("h0")
    live = bench.begin(make_request(n=2))
    bench.lose("h0")
    assert (live.parked, bench.timers.pending) == ([0, 1], 1)
    bench.timers.advance(30.0)
    with pytest.raises(EngineLost, match="no engine came within 30 s"):
        await read_now(live)
    bench.assert_empty()


async def test_the_wait_for_an_engine_has_an_end() -> None:
    bench = Bench("h0", config=ClientConfig(park_s=30.0))
    live = parked(bench, make_request())
    bench.timers.advance(29.9)
    assert not live.over
    bench.timers.advance(0.1)
    assert await read(live) == [0], "what had come is read first"
    with pytest.raises(EngineLost, match="no engine came within 30 s; last failure: engine h0: cut"):
        await read_now(live)
    assert bench.add("h0", generation=2).submits == []
    bench.assert_empty()


async def test_a_sample_that_is_finished_while_it_is_parked_is_not_computed_anew() -> None:
    bench = Bench("h0")
    live = parked(bench, make_request())
    bench.dispatch.finish_sample(live, 0)
    assert await read(live) == [0]
    assert await read_now(live) == []
    assert bench.add("h0", generation=2).submits == []
    bench.dispatch.end(live)
    bench.assert_empty()


# ---- every end in every state ----


def submitted(bench: Bench, request: Request) -> LiveRequest:
    return bench.begin(request)


def first_token(bench: Bench, request: Request) -> LiveRequest:
    live = bench.begin(request)
    bench.say("p0", *tokens(request, 0))
    return live


def decode_ahead(bench: Bench, request: Request) -> LiveRequest:
    live = bench.begin(request)
    bench.say("d0", *tokens(request, 1))
    return live


def decoding(bench: Bench, request: Request) -> LiveRequest:
    live = first_token(bench, request)
    bench.say("d0", *tokens(request, 1))
    return live


def resumed(bench: Bench, request: Request) -> LiveRequest:
    live = decoding(bench, request)
    bench.say("d0", failure(request, 0, "broken"))
    return live


def migrating(bench: Bench, request: Request) -> LiveRequest:
    live = decoding(bench, request)
    bench.add("d1")
    bench.dispatch.notice(bench["d0"], MigrationWanted(request.request_id, "d1"))
    assert len(bench.migrations) == 1
    return live


def migrating_to_a_lost_engine(bench: Bench, request: Request) -> LiveRequest:
    live = migrating(bench, request)
    bench.lose("d1")
    assert len(bench.migrations) == 1, "only the source knows whether the sample had left it"
    return live


def migrated(bench: Bench, request: Request) -> LiveRequest:
    live = migrating(bench, request)
    target = bench["d1"].submits[0].request
    bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, None))
    return live


def without_engines(bench: Bench, request: Request) -> LiveRequest:
    live = decoding(bench, request)
    bench.lose("d0")
    bench.lose("p0")
    assert live.parked
    return live


# A state, and who must hear of the end, by name: (engine, the request's name there).
STATES: list[tuple[Callable[[Bench, Request], LiveRequest], list[tuple[str, str]]]] = [
    (submitted, [("p0", "r1"), ("d0", "r1")]),
    (first_token, [("p0", "r1"), ("d0", "r1")]),
    (decode_ahead, [("p0", "r1"), ("d0", "r1")]),
    (decoding, [("p0", "r1"), ("d0", "r1")]),
    (resumed, [("d0", "r1~1.0")]),
    (migrating, [("p0", "r1"), ("d0", "r1"), ("d1", "r1~1.0")]),
    (migrating_to_a_lost_engine, [("p0", "r1"), ("d0", "r1")]),
    (migrated, [("d1", "r1~1.0")]),
    (without_engines, []),
]
states = pytest.mark.parametrize(("reach", "told"), STATES, ids=[reach.__name__ for reach, _ in STATES])


def aborts(bench: Bench) -> list[tuple[str, str]]:
    names = [name for name in ("p0", "d0", "d1") if bench.known(name)]
    return [(name, request_id) for name in names for request_id, sample in bench[name].aborts if sample is None]


@states
async def test_an_end_in_any_state_tells_every_engine_and_leaves_nothing(
    reach: Callable[[Bench, Request], LiveRequest], told: list[tuple[str, str]]
) -> None:
    bench = Bench("p0", "d0")
    live = reach(bench, make_request())
    before = aborts(bench)
    bench.dispatch.end(live, Cancelled("the request was cancelled"))
    assert sorted(aborts(bench)) == sorted(before + told)
    assert live.over
    bench.assert_empty()
    bench.dispatch.end(live)  # as the reader's own end, which comes last
    assert sorted(aborts(bench)) == sorted(before + told)


@states
async def test_time_is_up_in_any_state(
    reach: Callable[[Bench, Request], LiveRequest], told: list[tuple[str, str]]
) -> None:
    bench = Bench("p0", "d0")
    live = reach(bench, replace(make_request(), timeout_s=9.5))
    before = aborts(bench)
    bench.timers.advance(9.4)
    assert not live.over
    bench.timers.advance(0.1)
    assert sorted(aborts(bench)) == sorted(before + told)
    with pytest.raises(DeadlineExceeded, match=r"not done within 9\.5 s"):
        await read_all(live)
    assert bench.counters.timed_out == 1
    bench.assert_empty()


async def test_a_resume_takes_only_the_time_that_is_left() -> None:
    bench = Bench("h0")
    request = replace(make_request(), timeout_s=9.0)
    live = bench.begin(request)
    bench.timers.advance(4.0)
    bench.say("h0", failure(request, 0, "broken"))
    assert bench["h0"].submits[1].request.timeout_s == 5.0
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_a_request_that_is_done_is_never_late() -> None:
    bench = Bench("h0")
    request = replace(make_request(), timeout_s=9.0)
    live = bench.begin(request)
    bench.say("h0", *tokens(request, 0, last=0))
    bench.timers.advance(10.0)
    assert await read(live) == [0]
    assert await read_now(live) == []
    assert bench.counters.timed_out == 0
    bench.assert_empty()


async def test_finished_samples_end_one_by_one() -> None:
    bench = Bench("h0")
    request = make_request(n=2)
    live = bench.begin(request)
    bench.say("h0", *tokens(request, 0))
    for sample in (0, 0, 7):  # again, and one that it does not have
        bench.dispatch.finish_sample(live, sample)
    assert bench["h0"].aborts == [("r1", 0)]
    assert not live.over
    bench.dispatch.finish_sample(live, 1)
    assert bench["h0"].aborts == [("r1", 0), ("r1", 1)]
    assert live.over
    bench.assert_empty()


# ---- migration ----


async def test_the_targets_tokens_wait_for_the_sources_last_ones() -> None:
    bench = Bench("p0", "d0")
    request = make_request(max_tokens=6)
    live = migrating(bench, request)
    target = bench["d1"].submits[0].request
    assert (target.emitted, bench["d1"].submits[0].kind) == ((token_at(0, 0), token_at(0, 1)), LegKind.MIGRATION)
    bench.say("d1", *tokens(target, 3, 4))
    bench.say("d0", *tokens(request, 2))
    assert await read(live) == [0, 1, 2]
    bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, None))
    bench.say("d1", *tokens(target, 5, last=5))
    assert await read(live) == [3, 4, 5]
    assert bench.counters.migrated == 1
    bench.assert_empty()


async def test_the_target_may_be_first_to_show_that_the_sample_is_its_own() -> None:
    bench = Bench("p0", "d0")
    request = make_request(max_tokens=4)
    live = migrating(bench, request)
    target = bench["d1"].submits[0].request
    bench.say("d1", *tokens(target, 2))
    assert bench["d0"].aborts == [("r1", 0)], "the source may not know yet"
    bench.say("d0", *tokens(request, 2))
    bench.say("d1", *tokens(target, 3, last=3))
    assert await read(live) == [0, 1, 2, 3]
    bench.assert_empty()


async def test_a_refusal_leaves_the_sample_where_it_is() -> None:
    bench = Bench("p0", "d0")
    request = make_request(max_tokens=3)
    live = migrating(bench, request)
    target = bench["d1"].submits[0].request
    bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, "no room"))
    assert bench["d1"].aborts == [("r1~1.0", None)]
    bench.say("d0", *tokens(request, 2, last=2))
    assert await read(live) == [0, 1, 2]
    assert (bench.counters.migrated, bench.counters.migrations_failed, bench.counters.resumed) == (0, 1, 0)
    bench.assert_empty()


async def test_a_sample_that_left_for_an_engine_that_was_lost_is_computed_anew() -> None:
    bench = Bench("p0", "d0")
    live = migrating_to_a_lost_engine(bench, make_request())
    target = bench["d1"].submits[0].request
    bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, None))
    assert (live.resumes, live.last_reason) == (1, "migrated to d1, which was lost")
    (again,) = bench["p0"].submits[1:]
    assert again.request.emitted == (token_at(0, 0), token_at(0, 1))
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_a_drain_tries_again_with_a_growing_pause_and_then_computes_anew() -> None:
    """Guards a drain that would never end, or would hammer an engine that has no room."""
    bench = Bench("p0", "d0")
    request = make_request()
    live = decoding(bench, request)
    bench.add("d1")
    for tries, pause_s in enumerate((0.25, 0.5, 1.0, 2.0), start=1):
        bench.dispatch.drain(bench["d0"])
        assert len(bench["d1"].submits) == tries
        target = bench["d1"].submits[-1].request
        bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, "no room"))
        bench.timers.advance(pause_s - 0.01)
        bench.dispatch.drain(bench["d0"])
        assert len(bench["d1"].submits) == tries, "too early"
        bench.timers.advance(0.01)
    bench.dispatch.drain(bench["d0"])
    assert bench.counters.resumed == 1
    assert live.resumes == 0, "a drain costs no request one of its tries"
    assert bench["d0"].aborts == [("r1", None)]
    bench.dispatch.end(live)
    bench.assert_empty()


async def test_only_so_many_leave_an_engine_at_a_time() -> None:
    bench = Bench("p0", "d0", config=ClientConfig(max_migrations=2))
    lives = [decoding(bench, make_request(f"r{number}")) for number in range(5)]
    bench.add("d1")
    bench.dispatch.drain(bench["d0"])
    bench.dispatch.drain(bench["d0"])
    assert len(bench["d1"].submits) == 2
    target = bench["d1"].submits[0].request
    bench.dispatch.notice(bench["d0"], Migrated(target.request_id, target.epoch, None))
    bench.dispatch.drain(bench["d0"])
    assert len(bench["d1"].submits) == 3
    for live in lives:
        bench.dispatch.end(live)
    bench.assert_empty()
