"""A sequence on its way out, at its source: each state, what ends it, and what the ingress is told."""

from __future__ import annotations

import pytest

from kvbaton.decode_worker.migration import PAUSE_LIMIT_S, Migrations, MigrationState, copied_blocks
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.handoff_payload import decode_newest_tokens
from kvbaton.engine.kv.block_owners import BlockAudit, Holding
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import LegKind, Migrate, Migrated
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.kvtransfer.messages import Failed, Granted, HandoffKey, Offer, Released
from support.leg_bench import PEER, SESSION, LegBench
from support.worker_bench import prompt_of, request

KEY = HandoffKey("a~1", 1)


class Bench(LegBench):
    """One sample that decodes, with `computed` tokens in blocks of 4 and one more that is drawn."""

    def __init__(self, computed: int = 10) -> None:
        super().__init__(32)
        self.scheduler = DecodeScheduler(self.kv, 8, self.ledger.max_tokens)
        self.migrations = Migrations(self.ledger, self.agent, self.scheduler)
        prompt = prompt_of(min(6, computed))
        self.leg1: Leg = self.leg(request("a", prompt, max_tokens=90), LegKind.LOCAL)
        self.seq = self.leg1.live[0] = Sequence(self.leg1.request, 0.0)
        self.seq.block_table = self.kv.allocate(-(-computed // 4))
        self.seq.num_computed = computed
        self.seq.tokens.extend(range(100, 100 + computed + 1 - len(prompt)))
        self.scheduler.add(self.seq)

    def order(self, context_tokens: int | None = None, to: object = PEER) -> Migrate:
        seen = len(self.seq.tokens) if context_tokens is None else context_tokens
        return Migrate("a", 0, to, KEY.request_id, KEY.epoch, seen)  # type: ignore[arg-type]

    def decode(self, tokens: int = 1) -> None:
        """The sequence goes on: a token is computed, the next one drawn."""
        for _ in range(tokens):
            (row,) = self.scheduler.schedule().rows
            self.scheduler.commit(row)
            self.seq.tokens.append(500)

    def reach(self, state: str) -> None:
        assert self.migrations.start(self.leg1, self.seq, self.order()) is None
        if state != "copying":
            self.migrations.released(Released(KEY, acked=True))
        if state in ("approaching", "paused"):
            self.migrations.advance(0.0)
        if state == "paused":
            self.migrations.granted(Granted(KEY, 2), 0.0)

    def notices(self) -> list[object]:
        return [notice for session, notice in self.ledger.outbox.take_notices() if session == SESSION]

    def check(self) -> BlockAudit:
        audit = self.ledger.audit([Holding(self.seq.block_table), *self.migrations.held()])
        assert audit.problems == ()
        return audit


@pytest.mark.parametrize(("context", "blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_copy_has_what_is_whole_at_the_source_for_sure(context: int, blocks: int) -> None:
    """The newest token that the ingress knows need not be computed."""
    assert copied_blocks(context, 4) == blocks


def test_whole_way_out() -> None:
    b = Bench(computed=10)
    b.reach("copying")
    assert b.told("offer") == [Offer(KEY, 8, 2)]
    assert (b.agent.names()[-1], b.migrations.state(b.seq)) == ("finish", MigrationState.COPYING)
    b.decode()
    b.migrations.granted(Granted(KEY, 0), 0.0)
    assert b.migrations.state(b.seq) is MigrationState.COPYING, "that was the copy's"
    assert b.migrations.released(Released(KEY, acked=True)) is None
    b.migrations.advance(0.0)
    assert b.told("offer")[1] == Offer(KEY, 12, 3)
    assert b.migrations.state(b.seq) is MigrationState.APPROACHING
    assert b.check().hold == 2
    b.migrations.granted(Granted(KEY, 2), 0.0)
    assert (b.seq.status, b.scheduler.running) == (Status.MIGRATING, [])
    assert decode_newest_tokens(b.told("finish")[1], 1009) == [500]  # type: ignore[arg-type]
    assert b.check().hold == 3
    moved = b.migrations.released(Released(KEY, acked=True))
    assert moved is not None
    assert (moved.leg, moved.seq, len(b.migrations)) == (b.leg1, b.seq, 0)
    assert b.notices() == [Migrated(KEY.request_id, KEY.epoch, None)]
    assert b.check().hold == 0


def test_short_sequence_has_no_copy() -> None:
    b = Bench(computed=3)
    assert b.migrations.start(b.leg1, b.seq, b.order()) is None
    assert (b.migrations.state(b.seq), b.agent.calls) == (MigrationState.APPROACHING, [])
    b.migrations.advance(0.0)
    assert b.told("offer") == [Offer(KEY, 4, 1)]


def test_rest_is_offered_once_the_last_block_has_a_token() -> None:
    """A block that is full has no successor yet: a step later it has."""
    b = Bench(computed=8)
    b.reach("approaching")
    assert len(b.told("offer")) == 1
    b.decode()
    b.migrations.advance(0.0)
    assert b.told("offer")[1] == Offer(KEY, 12, 3)


def test_sequence_that_fills_what_it_offered_waits_for_the_grant() -> None:
    b = Bench(computed=10)
    b.reach("approaching")
    b.decode(2)
    b.migrations.advance(0.0)
    assert (b.migrations.state(b.seq), b.seq.status) == (MigrationState.PAUSED, Status.MIGRATING)
    assert len(b.told("finish")) == 1, "the copy's: nothing of the rest before the grant"
    b.migrations.granted(Granted(KEY, 2), 0.0)
    assert len(decode_newest_tokens(b.told("finish")[1], 1009)) == 2  # type: ignore[arg-type]


def test_pause_has_a_limit() -> None:
    b = Bench()
    b.reach("paused")
    b.migrations.advance(PAUSE_LIMIT_S)
    assert b.seq.status is Status.MIGRATING
    b.migrations.advance(PAUSE_LIMIT_S + 0.1)
    assert (b.seq.status, b.scheduler.running) == (Status.RUNNING, [b.seq])
    assert b.notices() == [Migrated(KEY.request_id, KEY.epoch, "paused for 2 s")]


@pytest.mark.parametrize("how", ["failed", "called off", "ended"])
@pytest.mark.parametrize("state", ["copying", "approaching", "paused"])
def test_end_in_every_state(state: str, how: str) -> None:
    """But for an end of the sequence itself it decodes on here, and the ingress is told why."""
    b = Bench()
    b.reach(state)
    if how == "failed":
        b.migrations.failed(Failed(KEY, "broke"))
    elif how == "called off":
        b.migrations.stop_named(KEY, "broke")
    else:
        b.migrations.forget(b.seq, "broke")
    assert (len(b.migrations), b.seq in b.migrations) == (0, False)
    assert b.notices() == ([] if how == "ended" else [Migrated(KEY.request_id, KEY.epoch, "broke")])
    if how != "ended":
        assert (b.seq.status, b.scheduler.running) == (Status.RUNNING, [b.seq])
    assert ("cancel" in b.agent.names()) is (how != "failed")
    assert b.check().quarantine > 0
    assert b.migrations.released(Released(KEY, acked=False)) is None
    assert (b.check().quarantine, len(b.migrations.outgoing)) == (0, 0)


def test_preempted_sequence_is_not_put_back_into_the_batch() -> None:
    b = Bench()
    b.reach("approaching")
    b.scheduler.remove(b.seq)
    b.seq.to(Status.PREEMPTED)
    b.migrations.stop(b.seq, "preempted")
    assert b.scheduler.running == []
    assert b.notices() == [Migrated(KEY.request_id, KEY.epoch, "preempted")]


class TestRefusals:
    def test_second_migration_of_one_sequence(self) -> None:
        b = Bench()
        b.reach("copying")
        again = Migrate("a", 0, PEER, "a~2", 2, len(b.seq.tokens))
        assert b.migrations.start(b.leg1, b.seq, again) == "it is being migrated already"

    def test_name_that_is_still_closing(self) -> None:
        b = Bench()
        b.reach("copying")
        b.migrations.stop(b.seq, "x")
        assert b.migrations.start(b.leg1, b.seq, b.order()) == "a hand-off of that name is open"

    @pytest.mark.parametrize("context_tokens", [5, 12])
    def test_tokens_that_it_does_not_have(self, context_tokens: int) -> None:
        b = Bench(computed=10)
        refusal = b.migrations.start(b.leg1, b.seq, b.order(context_tokens))
        assert refusal == f"{context_tokens} tokens are said to be there, the sequence has 11"

    def test_sequence_that_does_not_run(self) -> None:
        b = Bench()
        b.scheduler.remove(b.seq)
        b.seq.to(Status.PREEMPTED)
        assert b.migrations.start(b.leg1, b.seq, b.order()) == "the sequence is preempted"
