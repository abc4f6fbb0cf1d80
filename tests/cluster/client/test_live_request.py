"""`LiveRequest` alone: the order of tokens, what may run ahead, what is a gap, and how a resumed sample is numbered."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs

from kvbaton.cluster.client.live_request import Attempt, LiveRequest, SampleFailure, TokenGap, resume_request
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from support.client_support import failure, token, token_at
from support.dispatch_bench import RecordedSession, read_now
from support.session_support import make_info, make_request

PREFILL, DECODE = RecordedSession(make_info("p0")), RecordedSession(make_info("d0"))


def attempt_at(live: LiveRequest, first: RecordedSession, second: RecordedSession, request: Request) -> Attempt:
    """An attempt for the request's samples; who places and books has no part in this file."""
    attempt = Attempt(live, request, first, second, None, set(request.sample_indices))  # type: ignore[arg-type]
    for index in request.sample_indices:
        live.samples[index].attempt = attempt
    return attempt


class Pair:
    """A request that p0 prefills and d0 decodes."""

    def __init__(self, request: Request | None = None) -> None:
        self.request = request or make_request()
        self.live = LiveRequest(self.request)
        self.attempt = attempt_at(self.live, PREFILL, DECODE, self.request)

    def prefill(self, *indices: int, sample: int = 0) -> None:
        for index in indices:
            assert self.live.accept(self.attempt, PREFILL, token(self.request, sample, index)) is None

    def decode(self, *indices: int, sample: int = 0, last: int | None = None) -> None:
        for index in indices:
            assert self.live.accept(self.attempt, DECODE, token(self.request, sample, index, index == last)) is None


async def read(live: LiveRequest) -> list[tuple[int, int]]:
    """(sample, index) of what can be read at once, maybe nothing."""
    outputs = await read_now(live) or []
    assert all(output.token_id == token_at(output.sample, output.index) for output in outputs)
    return [(output.sample, output.index) for output in outputs]


async def test_what_came_is_read_at_once_and_in_order() -> None:
    pair = Pair()
    pair.prefill(0)
    pair.decode(1, 2)
    assert await read(pair.live) == [(0, 0), (0, 1), (0, 2)]
    assert await read(pair.live) == []
    pair.decode(3, last=3)
    assert await read(pair.live) == [(0, 3)]
    assert await read_now(pair.live) == [], "the end"


async def test_a_reader_that_waits_is_woken() -> None:
    pair = Pair()
    waiting = asyncio.create_task(pair.live.read())
    await asyncio.sleep(0)
    pair.prefill(0)
    assert not waiting.done()
    pair.live.wake()
    assert [output.index for output in await waiting] == [0]


async def test_what_comes_twice_is_dropped() -> None:
    pair = Pair()
    pair.prefill(0, 0)
    pair.decode(0, 1, 1, 0, 2)
    assert await read(pair.live) == [(0, 0), (0, 1), (0, 2)]


async def test_decode_may_overtake_the_one_token_that_prefill_owes() -> None:
    pair = Pair()
    pair.decode(1, 2, 1, 3, last=3)
    assert await read(pair.live) == []
    assert not pair.live.over
    pair.prefill(0)
    assert await read(pair.live) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert pair.live.over


@pytest.mark.parametrize(
    ("before", "index", "message"),
    [
        ([0, 1], 3, "token 3 came where 2 was next"),
        ([0], 2, "token 2 came where 1 was next"),
        ([], 2, "token 2 came where 1 was next"),  # 0 is prefill's: decode may be ahead of it, but not with a hole
        ([1, 2], 4, "token 4 came where 3 was next"),
    ],
)
async def test_a_token_whose_predecessor_cannot_come_is_a_gap(before: list[int], index: int, message: str) -> None:
    pair = Pair()
    for known in before:
        (pair.prefill if known == 0 else pair.decode)(known)
    with pytest.raises(TokenGap, match=message):
        pair.decode(index)


async def test_one_engine_alone_never_runs_ahead() -> None:
    request = make_request()
    live = LiveRequest(request)
    attempt = attempt_at(live, DECODE, DECODE, request)
    with pytest.raises(TokenGap, match="token 1 came where 0 was next"):
        live.accept(attempt, DECODE, token(request, 0, 1))


async def test_samples_are_ordered_each_by_itself() -> None:
    pair = Pair(make_request(n=2))
    pair.prefill(0, sample=1)
    pair.decode(1, sample=0)
    pair.decode(1, sample=1)
    assert await read(pair.live) == [(1, 0), (1, 1)]
    pair.prefill(0, sample=0)
    assert await read(pair.live) == [(0, 0), (0, 1)]


async def test_only_a_token_behind_the_first_shows_that_decode_is_at_work() -> None:
    """Guards the moment from which prefill's death costs nothing."""
    pair = Pair()
    pair.prefill(0)
    assert not pair.attempt.decodes(0)
    pair.decode(0)  # a duplicate of prefill's says nothing of the hand-off
    assert not pair.attempt.decodes(0)
    pair.decode(1)
    assert pair.attempt.decodes(0)


async def test_who_is_needed() -> None:
    pair = Pair(make_request(n=2))
    stranger = RecordedSession(make_info("d9"))
    assert pair.attempt.needing(PREFILL) == pair.attempt.needing(DECODE) == {0, 1}
    pair.decode(1, sample=0)
    pair.prefill(0, sample=1)
    pair.decode(1, sample=1)
    assert pair.attempt.needing(PREFILL) == {0}, "its first token is still owed"
    pair.prefill(0, sample=0)
    assert pair.attempt.needing(PREFILL) == pair.attempt.needing(stranger) == set()
    assert pair.attempt.needing(DECODE) == {0, 1}


async def test_a_failure_counts_only_where_the_engine_is_needed() -> None:
    pair = Pair()
    lost = failure(pair.request, 0, "no blocks")
    assert pair.live.accept(pair.attempt, PREFILL, lost) == SampleFailure("engine p0: no blocks")
    pair.prefill(0)
    pair.decode(1)
    assert pair.live.accept(pair.attempt, PREFILL, lost) is None
    assert pair.live.accept(pair.attempt, DECODE, lost) == SampleFailure("engine d0: no blocks")


async def test_an_attempt_that_was_replaced_is_not_heard() -> None:
    pair = Pair()
    pair.prefill(0)
    again = attempt_at(pair.live, DECODE, DECODE, resume_request(pair.live, 0, now=0.0))
    pair.decode(1)
    assert await read(pair.live) == [(0, 0)]
    assert pair.live.attempts == [again]


async def test_tokens_that_came_are_read_before_the_error() -> None:
    pair = Pair()
    pair.prefill(0)
    pair.live.fail(RuntimeError("first"))
    pair.live.fail(RuntimeError("second"))
    assert await read(pair.live) == [(0, 0)]
    with pytest.raises(RuntimeError, match="first"):
        await read_now(pair.live)


async def test_a_resumed_sample_goes_on_where_its_tokens_end() -> None:
    request = make_request("r1", n=3)
    pair = Pair(replace(request, sampling=structs.replace(request.sampling, prompt_logprobs=1)))
    pair.prefill(0, sample=2)
    pair.decode(1, sample=2)
    pair.live.epoch = 4
    again = resume_request(pair.live, 2, now=0.0)
    assert (again.request_id, again.epoch, again.sample_indices) == ("r1~4.2", 4, (2,))
    assert again.emitted == (token_at(2, 0), token_at(2, 1))
    assert again.sampling.prompt_logprobs is None, "the client has the prompt's numbers"
    assert again.timeout_s is None
    untouched = resume_request(pair.live, 0, now=0.0)
    assert (untouched.request_id, untouched.emitted, untouched.sampling.prompt_logprobs) == ("r1~4.0", (), 1)


@pytest.mark.parametrize(("now", "left"), [(10.0, 5.0), (14.5, 0.5), (15.0, 0.001), (99.0, 0.001)])
async def test_a_resumed_sample_has_the_time_that_is_left(now: float, left: float) -> None:
    live = LiveRequest(replace(make_request(), timeout_s=60.0))
    live.deadline_s = 15.0
    assert resume_request(live, 0, now).timeout_s == left


async def test_the_client_knows_a_resumed_sample_by_its_own_name_and_numbers() -> None:
    """Guards `cached_tokens` and prompt log-probabilities, which a resume computes again for a longer context."""
    pair = Pair(make_request("r1"))
    pair.prefill(0)
    resumed = resume_request(pair.live, 0, now=0.0)
    attempt = attempt_at(pair.live, PREFILL, DECODE, resumed)
    assert attempt.base == 1
    early = token(resumed, 0, 2)
    owed = TokenOutput(resumed.request_id, resumed.epoch, 0, 1, token_at(0, 1), cached_tokens=99)
    for session, output in ((DECODE, early), (PREFILL, owed)):
        assert pair.live.accept(attempt, session, output) is None
    outputs = await read_now(pair.live) or []
    assert [(o.request_id, o.index, o.cached_tokens) for o in outputs] == [
        ("r1", 0, 16),
        ("r1", 1, None),
        ("r1", 2, None),
    ]
    with pytest.raises(TokenGap, match="token 4 came where 3 was next"):
        pair.live.accept(attempt, DECODE, token(resumed, 0, 4))


async def test_a_sample_that_is_done_takes_nothing_more() -> None:
    pair = Pair(make_request(n=2))
    pair.prefill(0, sample=0)
    pair.decode(1, sample=0, last=1)
    pair.decode(2, sample=0)
    outputs = await read_now(pair.live) or []
    assert [(output.index, output.finish) for output in outputs] == [(0, None), (1, FinishReason.LENGTH)]
    assert not pair.live.over, "the other sample is not"
