"""A prefill leg from its submit to the peer's acknowledgement, and its end in every state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.handoff_payload import decode_first_tokens
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import LegKind
from kvbaton.engine.outgoing import OutgoingState
from kvbaton.engine.request import FinishReason, Request
from kvbaton.engine.sequence import Status
from kvbaton.kvtransfer.messages import Cause, Failed, Granted, Offer, Released
from kvbaton.prefill_worker.worker import Prefilled, PrefillWorker
from support.leg_bench import LegBench, key_of
from support.toy_engine import expected_tokens
from support.worker_bench import prompt_of, request

LIMITS = BatchConfig(max_tokens_per_step=24, prefill_chunk_tokens=8)


class Bench(LegBench):
    def __init__(self, num_blocks: int = 32, limits: BatchConfig = LIMITS) -> None:
        super().__init__(num_blocks)
        self.worker = PrefillWorker(self.ledger, self.agent, limits)

    def submit(self, req: Request, kind: LegKind) -> Leg:
        leg = self.leg(req, kind)
        self.worker.submit(leg, 0.0)
        return leg

    def step(self, decode_rows: int = 0) -> list[Prefilled]:
        """What goes on here."""
        landed = self.run(self.worker.schedule(decode_rows, 0.0))
        self.audit(self.worker)
        return [prefilled for row in landed if (prefilled := self.worker.landed(row)) is not None]


def test_first_tokens_go_out_at_once_and_the_rest_to_the_peer() -> None:
    b = Bench()
    req = request("p", prompt_of(18), n=2)
    leg = b.submit(req, LegKind.PREFILL)
    for _ in range(3):
        assert b.step() == []
    firsts = {sample: expected_tokens(req.prompt, 1, sample=sample)[0] for sample in (0, 1)}
    assert {o.sample: o.token_id for o in b.outputs()} == firsts
    assert b.told("offer") == [Offer(key_of(req), 18, 5)]
    assert [len(ids) for ids in b.told("blocks_ready")] == [2, 2, 1]  # type: ignore[arg-type]
    assert [decode_first_tokens(payload) for payload in b.told("finish")] == [firsts]  # type: ignore[arg-type]
    assert (b.audit(b.worker).hold, leg.prompt, b.worker.handing_off) == (5, None, 1)
    assert b.worker.event(Released(key_of(req), acked=True)) == []
    assert (b.audit(b.worker).held, len(b.ledger.legs), b.worker.handing_off) == (0, 0, 0)
    assert b.kv.counts().cached == 4, "full blocks can be found again"


def test_cached_blocks_travel_before_anything_is_computed() -> None:
    b = Bench()
    b.submit(request("a", prompt_of(16)), LegKind.LOCAL)
    b.step()
    (done,) = b.step()
    b.kv.free(done.seq.block_table)
    b.submit(request("p", prompt_of(16)), LegKind.PREFILL)
    b.worker.schedule(0, 0.0)
    assert [len(ids) for ids in b.told("blocks_ready")] == [3]  # type: ignore[arg-type]


def test_hand_off_counts_as_its_sequences_until_it_is_complete() -> None:
    """Guards the gauges: a prompt that is computed is no hold yet."""
    b = Bench()
    b.submit(request("p", prompt_of(18)), LegKind.PREFILL)
    b.step()
    audit = b.audit(b.worker)
    assert (audit.sequence, audit.hold) == (5, 0)


def test_request_that_ends_with_its_first_token_calls_the_hand_off_off() -> None:
    b = Bench()
    req = request("p", prompt_of(6), max_tokens=1)
    b.submit(req, LegKind.PREFILL)
    b.step()
    assert [o.finish for o in b.outputs()] == [FinishReason.LENGTH]
    assert b.told("cancel") == [("finished with its first token", Cause.FINISHED)]
    assert (len(b.ledger.legs), b.audit(b.worker).quarantine) == (0, 2)
    b.worker.event(Released(key_of(req), acked=False))
    assert b.audit(b.worker).held == 0


def test_local_prompt_goes_on_here_with_its_tokens() -> None:
    b = Bench()
    leg = b.submit(request("a", prompt_of(6), n=2), LegKind.LOCAL)
    (prefilled,) = b.step()
    assert (prefilled.leg, prefilled.seq.samples, leg.prompt) == (leg, (0, 1), None)
    assert [token.token_id for token in prefilled.sampled] == [
        expected_tokens(prompt_of(6), 1, sample=sample)[0] for sample in (0, 1)
    ]
    assert (b.agent.calls, b.outputs()) == ([], [])


def test_prompt_logprobs_of_all_chunks_are_collected() -> None:
    b = Bench()
    leg = b.submit(request("a", prompt_of(6)), LegKind.LOCAL)
    (row,) = b.run(b.worker.schedule(0, 0.0))
    b.worker.landed(replace(row, prompt_logprobs=(None,)))
    assert leg.prompt_logprobs == [None]


def test_running_streams_wait_for_one_chunk_at_most() -> None:
    b = Bench()
    for i in range(3):
        b.submit(request(f"r{i}", prompt_of(20, i)), LegKind.LOCAL)
    assert sum(row.num_tokens for row in b.worker.schedule(0, 0.0)) == 24
    assert sum(row.num_tokens for row in b.worker.schedule(5, 0.0)) == 8


def preempted_sample(b: Bench) -> Leg:
    """A sample that ran, gave its blocks up and waits to be computed again."""
    leg = b.submit(request("a", prompt_of(6)), LegKind.LOCAL)
    (prefilled,) = b.step()
    live = leg.live[0] = prefilled.seq
    live.to(Status.RUNNING)
    live.tokens.append(prefilled.sampled[0].token_id)
    b.kv.free(live.block_table)
    live.num_computed = 0
    live.to(Status.PREEMPTED)
    assert not b.worker.owes_blocks
    b.worker.recompute([live])
    return leg


def test_preempted_sample_is_computed_again_with_what_it_has() -> None:
    b = Bench()
    leg = preempted_sample(b)
    assert (b.worker.owes_blocks, b.worker.waiting, b.worker.waiting_tokens) == (True, 1, 7)
    (row,) = b.run(b.worker.schedule(0, 0.0))
    again = b.worker.landed(row)
    assert again is not None
    assert again.seq is leg.live[0]
    assert again.sampled[0].token_id == expected_tokens(prompt_of(6), 2)[1]
    assert b.agent.calls == []


def test_withdrawn_sample_is_not_computed() -> None:
    b = Bench()
    leg = preempted_sample(b)
    b.worker.withdraw(leg, 1)
    assert b.worker.waiting == 1, "there is no such sample"
    b.worker.withdraw(leg, 0)
    b.worker.withdraw(leg, 0)
    assert (b.worker.waiting, b.worker.owes_blocks) == (0, False)


@pytest.mark.parametrize("state", ["queued", "computing", "sent", "closing"])
@pytest.mark.parametrize("how", ["end", "failed"])
def test_end_in_every_state_gives_all_back_after_release(state: str, how: str) -> None:
    """The agent's word about a hand-off comes in any state; blocks stay until no operation can read them."""
    b = Bench()
    req = request("p", prompt_of(18))
    leg = b.submit(req, LegKind.PREFILL)
    for _ in range({"queued": 0, "computing": 1}.get(state, 3)):
        b.step()
    if state == "closing":
        b.worker.end(leg, "first")
    before = b.worker.outgoing.state(key_of(req))
    assert before is {"queued": None, "computing": OutgoingState.OPEN, "sent": OutgoingState.SENT}.get(
        state, OutgoingState.CLOSING
    )
    news = b.worker.event(Failed(key_of(req), "peer is gone")) if how == "failed" else []
    assert news == ([Ending(leg, "peer is gone")] if how == "failed" and state in ("computing", "sent") else [])
    b.worker.end(leg, "over")
    b.ledger.legs.remove(leg)
    audit = b.audit(b.worker)
    assert (audit.held, audit.quarantine) == ((0, 0) if state == "queued" else (5, 5))
    cancels = {"queued": 0, "computing": 1, "sent": 1, "closing": 1}[state]
    assert len(b.told("cancel")) == (cancels if how == "end" or state == "closing" else 0)
    b.worker.event(Released(key_of(req), acked=False))
    assert (b.audit(b.worker).held, b.worker.handing_off, b.worker.waiting) == (0, 0, 0)


def test_events_of_other_hand_offs_are_not_news() -> None:
    b = Bench()
    req = request("p", prompt_of(18))
    b.submit(req, LegKind.PREFILL)
    b.step()
    other = key_of(request("other", (1,)))
    for event in (Failed(other, "x"), Released(other, acked=True), Granted(other, 0), Granted(key_of(req), 0)):
        assert b.worker.event(event) == []
    assert b.worker.outgoing.state(key_of(req)) is OutgoingState.OPEN


def test_waiting_hand_offs_bound_what_begins() -> None:
    b = Bench(num_blocks=20)
    for i in range(5):
        b.submit(request(f"p{i}", prompt_of(18, i)), LegKind.PREFILL)
    for _ in range(12):
        b.step()
    assert (b.worker.handing_off, b.worker.waiting) == (3, 2), "three times five blocks are three quarters of twenty"
    b.worker.event(Released(key_of(request("p0", (1,))), acked=True))
    b.step()
    assert b.worker.handing_off == 3
