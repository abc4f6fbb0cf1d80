"""The decode leg's facade: what it does with samples, and what it leaves behind at their end."""

from __future__ import annotations

import pytest

from kvbaton.decode_worker.worker import DecodeWorker
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.handoff_payload import encode_first_tokens
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import LegKind, Migrate, Migrated, MigrationWanted
from kvbaton.engine.request import FinishReason, Request
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.kvtransfer.messages import Granted, HandoffKey, Landed, Offer, Offered, Released
from support.leg_bench import PEER, SESSION, LegBench, key_of
from support.toy_engine import expected_tokens
from support.worker_bench import prompt_of, request

PROMPT = prompt_of(10)


class Bench(LegBench):
    def __init__(self, num_blocks: int = 32, pipelined: bool = False) -> None:
        super().__init__(num_blocks, pipelined)
        self.worker = DecodeWorker(self.ledger, self.agent, BatchConfig())

    def computed(self, req: Request) -> tuple[Leg, Sequence]:
        """A local leg whose prompt has been computed."""
        leg = self.leg(req, LegKind.LOCAL)
        seq = Sequence(req, 0.0)
        seq.block_table = self.kv.allocate(-(-len(req.prompt) // 4))
        for position, token in enumerate(req.prompt):
            self.engine.slots[seq.block_table[position // 4], position % 4] = token
        seq.num_computed = len(req.prompt)
        seq.to(Status.PREFILLING)
        return leg, seq

    def begin(self, req: Request) -> Leg:
        leg, seq = self.computed(req)
        drawn = tuple(SampledToken(expected_tokens(req.prompt, 1, sample=s)[0]) for s in seq.samples)
        self.worker.begin(leg, seq, drawn)
        return leg

    def step(self) -> None:
        plan = self.worker.schedule(0.0)
        if plan.copies:
            self.engine.copy_blocks(plan.copies)
        for row in self.run(plan.rows) if plan.rows else []:
            self.worker.landed(row)
        self.audit(self.worker)

    def tokens(self, sample: int = 0) -> list[int | None]:
        return [output.token_id for output in self.outputs() if output.sample == sample]


def test_samples_of_a_prompt_share_its_blocks_and_stay_exact() -> None:
    b = Bench()
    leg = b.begin(request("n", PROMPT, max_tokens=6, n=2))
    assert (b.worker.running, b.worker.context_tokens, b.kv.counts().held) == (2, 22, 3)
    assert [seq.cached_tokens for seq in leg.live.values()] == [0, 0]
    for _ in range(5):
        b.step()
    outputs = b.outputs()
    for sample in (0, 1):
        mine = [o for o in outputs if o.sample == sample]
        assert [o.token_id for o in mine] == expected_tokens(PROMPT, 6, sample=sample)
        assert mine[-1].finish is FinishReason.LENGTH
    assert (len(b.ledger.legs), b.audit(b.worker).held) == (0, 0)


def test_sample_that_was_dropped_before_is_not_begun() -> None:
    """An abort of one sample while the prompt of all was being computed."""
    b = Bench()
    leg, seq = b.computed(request("n", PROMPT, n=2))
    assert b.worker.abort_sample(leg, 1) == []
    b.worker.begin(leg, seq, (SampledToken(3), SampledToken(4)))
    assert (list(leg.live), b.tokens(0), b.worker.running) == ([0], [3], 1)


def test_leg_of_which_every_sample_was_dropped_ends() -> None:
    b = Bench()
    leg, _ = b.computed(request("n", PROMPT, n=2))
    assert b.worker.abort_sample(leg, 1) == []
    assert b.worker.abort_sample(leg, 0) == [Ending(leg, None)]


def test_first_token_may_be_the_last() -> None:
    b = Bench()
    b.begin(request("a", PROMPT, max_tokens=1))
    assert (b.worker.running, len(b.ledger.legs), b.audit(b.worker).held) == (0, 0, 0)


def test_preempted_sample_goes_on_where_it_was() -> None:
    b = Bench()
    leg = b.begin(request("a", PROMPT, max_tokens=9))
    taken = b.kv.allocate(b.kv.available)
    for _ in range(3):
        plan = b.worker.schedule(0.0)
        for row in b.run(plan.rows) if plan.rows else []:
            b.worker.landed(row)
    (seq,) = plan.preempted
    assert (leg.live[0], seq.block_table, b.worker.running) == (seq, [], 0)
    b.kv.release(taken)
    seq.block_table = b.kv.allocate(-(-len(seq.tokens) // 4))
    seq.num_computed = len(seq.tokens)
    seq.to(Status.PREFILLING)
    b.worker.begin(leg, seq, (SampledToken(expected_tokens(PROMPT, 4)[3]),))
    assert b.tokens() == expected_tokens(PROMPT, 4)
    assert b.worker.running == 1


def land(b: Bench, req: Request, drawn: int) -> Leg:
    leg = b.leg(req, LegKind.DECODE)
    b.worker.submit(leg, 0.0)
    b.worker.event(Offered(Offer(key_of(req), 10, 3), PEER), 0.0)
    assert (b.worker.waiting, b.worker.grant(closed=False), b.worker.waiting) == (1, [], 0)
    b.worker.event(Landed(key_of(req), encode_first_tokens({0: drawn})), 0.0)
    return leg


def test_landed_prompt_runs_and_numbers_its_tokens_from_the_second() -> None:
    b = Bench()
    first = expected_tokens(PROMPT, 1)[0]
    leg = land(b, request("d", PROMPT, max_tokens=3), first)
    for position, token in enumerate(PROMPT):
        b.engine.slots[leg.live[0].block_table[position // 4], position % 4] = token
    b.step()
    b.step()
    assert [(o.index, o.token_id) for o in b.outputs()] == list(enumerate(expected_tokens(PROMPT, 3)))[1:]
    assert (b.worker.arriving, len(b.ledger.legs)) == (0, 0)


def test_migrated_sample_ends_here_without_a_word_but_the_notice() -> None:
    b = Bench()
    leg = b.begin(request("a", PROMPT, max_tokens=9))
    b.outputs()
    b.worker.migrate(SESSION, Migrate("a", 0, PEER, "a~1", 1, 11))
    key = HandoffKey("a~1", 1)
    b.worker.event(Released(key, acked=True), 0.0)
    b.step()
    b.worker.event(Granted(key, 2), 0.0)
    assert (b.worker.running, b.worker.handing_off) == (0, 1)
    b.worker.event(Released(key, acked=True), 0.0)
    assert b.ledger.outbox.take_notices() == [(SESSION, Migrated("a~1", 1, None))]
    assert (leg.live, len(b.ledger.legs), b.audit(b.worker).held, b.worker.handing_off) == ({}, 0, 0, 0)


def test_migration_of_what_does_not_decode_here_is_refused() -> None:
    b = Bench()
    b.begin(request("a", PROMPT))
    for session, name, sample in ((SESSION + 1, "a", 0), (SESSION, "b", 0), (SESSION, "a", 1)):
        b.worker.migrate(session, Migrate(name, sample, PEER, "x", 1, 11))
        assert b.ledger.outbox.take_notices() == [(session, Migrated("x", 1, "no such sample decodes here"))]


def test_ingresses_are_asked_to_move_what_is_here() -> None:
    b = Bench()
    b.begin(request("a", PROMPT))
    b.begin(request("b", PROMPT))
    b.worker.evacuate("a", "d1")
    b.worker.evacuate(None, None)
    notices = [notice for _, notice in b.ledger.outbox.take_notices()]
    assert notices == [MigrationWanted("a", "d1"), MigrationWanted("a"), MigrationWanted("b")]


class TestLag:
    """What has to be known before the next step can be scheduled."""

    def test_plain_samples_lag(self) -> None:
        b = Bench()
        b.begin(request("a", PROMPT))
        assert b.worker.may_lag()

    def test_host_side_sampling_does_not(self) -> None:
        b = Bench()
        b.begin(request("a", PROMPT, logprobs=1))
        assert not b.worker.may_lag()

    def test_migration_does_not(self) -> None:
        b = Bench()
        b.begin(request("a", PROMPT))
        b.worker.migrate(SESSION, Migrate("a", 0, PEER, "a~1", 1, 11))
        assert not b.worker.may_lag()

    def test_full_pool_does_not(self) -> None:
        b = Bench()
        b.begin(request("a", prompt_of(11)))
        b.kv.allocate(b.kv.available)
        assert b.worker.may_lag(), "its block has a slot left"
        for row in b.run(b.worker.schedule(0.0).rows):
            b.worker.landed(row)
        assert not b.worker.may_lag()


@pytest.mark.parametrize("state", ["expected", "waiting", "granted", "running", "migrating", "preempted"])
def test_end_in_every_state(state: str) -> None:
    b = Bench()
    req = request("d", PROMPT, max_tokens=30)
    if state in ("running", "migrating", "preempted"):
        leg = b.begin(req)
    else:
        leg = b.leg(req, LegKind.DECODE)
        b.worker.submit(leg, 0.0)
    if state in ("waiting", "granted"):
        b.worker.event(Offered(Offer(key_of(req), 10, 3), PEER), 0.0)
    if state == "granted":
        b.worker.grant(closed=False)
    if state == "migrating":
        b.worker.migrate(SESSION, Migrate("d", 0, PEER, "d~1", 1, 11))
    if state == "preempted":
        taken = b.kv.allocate(b.kv.available)
        while not b.worker.schedule(0.0).preempted:
            (row,) = b.run(b.worker.schedule(0.0).rows)
            b.worker.landed(row)
        b.kv.release(taken)
    b.worker.end(leg, "over")
    b.ledger.legs.remove(leg)
    assert leg.live == {}
    quarantined = {"granted": 3, "migrating": 2}.get(state, 0)
    assert (b.audit(b.worker).held, b.worker.running) == (quarantined, 0)
    for key in (key_of(req), HandoffKey("d~1", 1)):
        b.worker.event(Released(key, acked=False), 0.0)
    assert (b.audit(b.worker).held, b.worker.arriving, b.worker.handing_off) == (0, 0, 0)


def test_sample_that_ends_with_a_row_on_its_way_keeps_its_blocks_until_that_has_landed() -> None:
    b = Bench(pipelined=True)
    leg = b.begin(request("a", PROMPT, max_tokens=30))
    b.ledger.pipeline.launch(b.worker.schedule(0.0).rows)
    b.worker.end(leg, "over")
    b.ledger.legs.remove(leg)
    assert b.audit(b.worker).held == 3
    assert b.ledger.pipeline.land() == []
    assert b.audit(b.worker).held == 0
