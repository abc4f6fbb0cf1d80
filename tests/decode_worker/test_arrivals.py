"""DECODE and MIGRATION legs until their samples run, over a ledger whose blocks are audited."""

from __future__ import annotations

import pytest

from kvbaton.decode_worker.arrivals import STUCK_S, Arrivals
from kvbaton.decode_worker.incoming import IncomingState
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.handoff_payload import encode_first_tokens, encode_newest_tokens
from kvbaton.engine.kv.block_owners import Holding
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import LegKind
from kvbaton.engine.request import Request
from kvbaton.engine.sequence import Status
from kvbaton.kvtransfer.messages import Cause, Failed, Landed, Landing, Offer, Offered, Released
from support.leg_bench import PEER, LegBench, key_of
from support.worker_bench import prompt_of, request


class Bench(LegBench):
    def __init__(self, num_blocks: int = 16) -> None:
        super().__init__(num_blocks)
        self.scheduler = DecodeScheduler(self.kv, 8, self.ledger.max_tokens)
        self.arrivals = Arrivals(self.ledger, self.agent, self.scheduler)

    def expect(self, req: Request, kind: LegKind = LegKind.DECODE) -> Leg:
        leg = self.leg(req, kind)
        self.arrivals.expect(leg, 0.0)
        return leg

    def offer(self, req: Request, tokens: int, blocks: int) -> None:
        self.arrivals.offered(Offered(Offer(key_of(req), tokens, blocks), PEER), 0.0)

    def land(self, req: Request, payload: bytes) -> list[Ending]:
        return self.arrivals.landed(Landed(key_of(req), payload), 0.0)

    def check(self, *legs: Leg) -> None:
        live = [Holding(seq.block_table) for leg in legs for seq in leg.live.values()]
        assert self.ledger.audit([*live, *self.arrivals.held()]).problems == ()


def granted(b: Bench, req: Request) -> Leg:
    leg = b.expect(req)
    b.offer(req, len(req.prompt), -(-len(req.prompt) // 4))
    assert b.arrivals.grant(closed=False, joining=0) == []
    return leg


def test_samples_join_with_the_tokens_that_prefill_drew() -> None:
    b = Bench()
    req = request("d", prompt_of(10), n=3)
    leg = granted(b, req)
    leg.dropped.add(1)
    assert b.land(req, encode_first_tokens({0: 5, 1: 6, 2: 7})) == []
    assert {sample: seq.tokens[-1] for sample, seq in leg.live.items()} == {0: 5, 2: 7}
    assert [seq.num_uncomputed for seq in b.scheduler.running] == [1, 1]
    assert b.agent.names()[-1] == "ack"
    b.check(leg)
    assert len(b.kv.match(next(iter(leg.live.values())).hashes(4, 2))) == 2, "its full blocks can be found"


def test_leg_without_a_sample_that_goes_on_is_over() -> None:
    b = Bench()
    req = request("d", prompt_of(10))
    leg = granted(b, req)
    leg.dropped.add(0)
    b.land(req, encode_first_tokens({0: 5}))
    assert (len(b.ledger.legs), b.kv.counts().held) == (0, 0)


def test_payload_that_cannot_be_ends_the_leg() -> None:
    b = Bench()
    req = request("d", prompt_of(10))
    leg = granted(b, req)
    (ending,) = b.land(req, b"odd")
    assert (ending.leg, ending.error) == (leg, "hand-off refused: first tokens: 3 bytes is not a multiple of 16")


def migrating(b: Bench, emitted: int = 0) -> tuple[Request, Leg]:
    req = request("m", prompt_of(10), emitted=(3,) * emitted)
    return req, b.expect(req, LegKind.MIGRATION)


def test_migrated_sequence_comes_in_two_parts_under_one_key() -> None:
    b = Bench()
    req, leg = migrating(b)
    b.offer(req, 8, 2)
    b.arrivals.grant(closed=False, joining=0)
    b.land(req, b"")
    assert b.arrivals.incoming.state(key_of(req)) is IncomingState.EXPECTED
    b.check(leg)
    b.offer(req, 16, 4)
    b.arrivals.grant(closed=False, joining=0)
    assert b.told("grant") == [Landing(0, (0, 1)), Landing(2, (2, 3))]
    b.land(req, encode_newest_tokens([11, 12, 13, 14]))
    (seq,) = leg.live.values()
    assert (seq.tokens, seq.num_computed, seq.status) == ([*req.prompt, 11, 12, 13, 14], 13, Status.RUNNING)
    assert b.agent.names().count("ack") == 2
    b.check(leg)


def test_short_migrated_sequence_comes_in_one() -> None:
    b = Bench()
    req = request("m", prompt_of(3))
    leg = b.expect(req, LegKind.MIGRATION)
    b.offer(req, 4, 1)
    b.arrivals.grant(closed=False, joining=0)
    b.land(req, encode_newest_tokens([11]))
    assert leg.live[0].num_computed == 3


@pytest.mark.parametrize("newest", [[1009], [-1], [1] * 9])
def test_migrated_tokens_that_cannot_be_end_the_leg(newest: list[int]) -> None:
    """Out of vocabulary, below zero, and more of them than the blocks that came."""
    b = Bench()
    req, leg = migrating(b)
    b.offer(req, 8, 2)
    b.arrivals.grant(closed=False, joining=0)
    b.land(req, b"")
    b.offer(req, 12, 3)
    b.arrivals.grant(closed=False, joining=0)
    (ending,) = b.land(req, encode_newest_tokens(newest))
    assert ending.leg is leg
    assert str(ending.error).startswith("hand-off refused: ")
    b.arrivals.cancel(leg, "over")
    b.arrivals.released(Released(key_of(req), acked=False))
    assert b.kv.counts().held == 0


def test_migration_without_room_ends_and_a_prompt_waits() -> None:
    b = Bench(num_blocks=4)
    prompt = request("d", prompt_of(16))
    b.expect(prompt)
    b.offer(prompt, 16, 4)
    req, leg = migrating(b)
    b.offer(req, 8, 2)
    held = b.kv.allocate(3)
    assert b.arrivals.grant(closed=False, joining=0) == [Ending(leg, "no room for a sequence that decodes elsewhere")]
    assert b.arrivals.waiting == 2, "whoever ends the leg cancels it"
    b.kv.release(held)


def test_joining_sequences_have_a_block_each() -> None:
    b = Bench(num_blocks=4)
    req = request("d", prompt_of(12))
    b.expect(req)
    b.offer(req, 12, 3)
    b.arrivals.grant(closed=False, joining=2)
    assert b.arrivals.waiting == 1
    b.arrivals.grant(closed=False, joining=1)
    assert b.arrivals.waiting == 0


@pytest.mark.parametrize(
    ("cause", "error"), [(Cause.FAILED, "broke"), (Cause.CANCELLED, "broke"), (Cause.FINISHED, None)]
)
def test_failed_hand_off_ends_its_leg_and_is_no_error_where_it_was_not_needed(cause: Cause, error: str | None) -> None:
    b = Bench()
    req = request("d", prompt_of(10))
    leg = granted(b, req)
    failed = Failed(key_of(req), "broke", cause)
    assert b.arrivals.failed(failed) == [Ending(leg, error)]
    assert b.arrivals.failed(failed) == [], "told once"


def test_one_of_those_that_wait_for_each_other_is_given_up_after_a_while() -> None:
    b = Bench(num_blocks=2)
    leg = b.expect(request("d", prompt_of(10)))
    b.offer(request("d", prompt_of(10)), 10, 3)
    assert b.arrivals.unstick(progress=True, now=5.0) == []
    assert b.arrivals.unstick(progress=False, now=5.0 + STUCK_S) == []
    assert [ending.leg for ending in b.arrivals.unstick(progress=False, now=5.1 + STUCK_S)] == [leg]
    assert b.arrivals.unstick(progress=False, now=5.2 + STUCK_S) == [], "the next has as much time"


def test_nothing_is_stuck_where_nothing_waits() -> None:
    b = Bench()
    b.expect(request("d", prompt_of(10)))
    assert b.arrivals.unstick(progress=False, now=100.0) == []
