"""Who of the waiting prompts is next, and how much of the pool may wait for other engines."""

from __future__ import annotations

import pytest

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.prefill_worker.queue import HoldLimit, PrefillQueue


def sequence(name: str, tokens: int, arrival_s: float = 0.0, emitted: int = 0) -> Sequence:
    request = Request(name, tuple(range(1, tokens + 1)), SamplingParams(max_tokens=9), emitted=(5,) * emitted)
    return Sequence(request, arrival_s)


def order(queue: PrefillQueue, now: float) -> list[str]:
    return [seq.request.request_id for seq in queue.ordered(now)]


def queue_of(*sequences: Sequence, ageing: float = 100.0) -> PrefillQueue:
    queue = PrefillQueue(ageing)
    for seq in sequences:
        queue.add(seq)
    return queue


def test_shortest_remaining_work_goes_first() -> None:
    begun = sequence("begun", 100)
    begun.num_computed = 96
    queue = queue_of(sequence("long", 100), sequence("short", 10), begun)
    assert order(queue, 0.0) == ["begun", "short", "long"]
    assert queue.uncomputed_tokens() == 4 + 10 + 100


def test_equal_work_goes_by_arrival() -> None:
    assert order(queue_of(sequence("b", 8, 2.0), sequence("a", 8, 1.0)), 1.0) == ["a", "b"]


@pytest.mark.parametrize(("waited_s", "first"), [(0.5, "new"), (1.1, "old")])
def test_waiting_is_worth_tokens(waited_s: float, first: str) -> None:
    """Guards a long prompt from a stream of short ones: after 110 tokens' worth of time it is ahead of them."""
    queue = queue_of(sequence("old", 120, 0.0), sequence("new", 10, waited_s))
    assert order(queue, waited_s)[0] == first


def test_streams_that_gave_way_go_before_everybody_oldest_first() -> None:
    streams = [sequence("late", 500, 3.0), sequence("early", 900, 1.0)]
    for seq in streams:
        for status in (Status.RUNNING, Status.PREEMPTED):
            seq.to(status)
    queue = queue_of(sequence("short", 1), *streams)
    assert order(queue, 9.0) == ["early", "late", "short"]
    assert queue.preempted


def test_resume_is_no_stream_until_it_has_drawn_a_token_here() -> None:
    queue = queue_of(sequence("resumed", 50, emitted=3), sequence("short", 4))
    assert order(queue, 0.0) == ["short", "resumed"]
    assert not queue.preempted


def test_remembers_who_is_for_a_peer_only_while_it_is_here() -> None:
    queue, seq = PrefillQueue(), sequence("p", 4)
    queue.add(seq, for_peer=True)
    assert queue.for_peer(seq)
    queue.remove(seq)
    assert (seq in queue, queue.for_peer(seq), len(queue)) == (False, False, 0)


class TestHoldLimit:
    LIMITS = BatchConfig(max_held_fraction=0.5, max_handoffs=3)

    def limit(self, handoffs: int, blocks: int) -> HoldLimit:
        limit = HoldLimit(40, self.LIMITS)
        limit.begin_step(handoffs, blocks)
        return limit

    @pytest.mark.parametrize(("blocks", "admitted"), [(5, True), (6, False)])
    def test_share_of_the_pool(self, blocks: int, admitted: bool) -> None:
        assert self.limit(1, 15).admits(blocks) is admitted

    def test_number_of_hand_offs(self) -> None:
        assert self.limit(2, 2).admits(1)
        assert not self.limit(3, 3).admits(1)

    def test_the_only_one_is_never_too_large(self) -> None:
        assert self.limit(0, 0).admits(40)

    def test_those_begun_in_this_step_count(self) -> None:
        limit = self.limit(0, 0)
        limit.took(18)
        assert [limit.admits(blocks) for blocks in (2, 3)] == [True, False]
        limit.took(1)
        limit.took(1)
        assert not limit.admits(0), "three are open"
