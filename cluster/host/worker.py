"""What one engine does between two forward passes, and in which order. Single-threaded, no Ray, no sockets.

A step is schedule, launch, publish (often the step before: `StepPipeline`). Decode rows go first, prefill chunks fill
the rest of the token budget, both in one forward pass. What a leg needs is known to its worker:

    LOCAL leg       `PrefillWorker` -> `DecodeWorker`
    PREFILL leg     `PrefillWorker`: first token to the ingress, KV to the peer
    DECODE leg      `DecodeWorker`: KV lands, decodes
    MIGRATION leg   `DecodeWorker`, at the source and at the target

An engine's role only decides what the router sends here: it is no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvbaton.cluster.host.inbox import Item
from kvbaton.decode_worker.worker import DecodeWorker
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.block_owners import BlockAudit, Owner
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import Abort, Evacuate, LegKind, MigrationOrdered, Notice, Submitted
from kvbaton.engine.request import ErrorCause, TokenOutput
from kvbaton.engine.sequence import Status
from kvbaton.engine.step_pipeline import LandedRow, StepEngine
from kvbaton.kvtransfer.messages import HandoffCommands
from kvbaton.prefill_worker.worker import PrefillWorker
from kvbaton.router.engine_info import EngineLoad

DEADLINE_GRACE_S = 1.0  # the ingress is nearer to the client: it is first to say that the time is up


class Worker:
    """Orders the steps of one engine. All calls come from the engine thread, but for `empty` and `num_requests`; the
    ledger and the two workers are there to be looked at."""

    def __init__(self, engine: StepEngine, agent: HandoffCommands, limits: BatchConfig) -> None:
        self.engine = engine
        self._agent = agent
        self.max_requests = limits.max_waiting + limits.max_running
        self.ledger = Ledger(engine)
        self._check = SubmitCheck(self.ledger.max_tokens, engine.vocab_size, self.max_requests)
        self._pipeline = self.ledger.pipeline
        self.prefill = PrefillWorker(self.ledger, agent, limits)
        self.decode = DecodeWorker(self.ledger, agent, limits)

    # ---- what comes in ------------------------------------------------------------------------------------------

    def handle(self, item: Item, now: float) -> None:
        """Apply one order, or one event of the transfer agent."""
        match item:
            case Submitted():
                self._submit(Leg(item.session_id, item.submit), now)
            case Abort():
                self._abort(item)
            case MigrationOrdered():
                self.decode.migrate(item.session_id, item.order)
            case Evacuate():
                self.decode.evacuate(item.request_id, item.to)
            case event:
                self._end_all(self.prefill.event(event))
                self._end_all(self.decode.event(event, now))

    def step(self, now: float) -> bool:
        """Schedule, launch, publish into the outbox. False when there was nothing to run."""
        lagging = self.engine.pipelined and self.decode.may_lag()
        landed = not lagging and self.settle()
        self._end_all(self.decode.overdue(now))
        self._end_all(Ending(leg, "the request's time is up") for leg in self.ledger.legs.overdue(now))
        plan = self.decode.schedule(now)
        self.prefill.recompute(plan.preempted)
        self._end_all(self.decode.grant(closed=self.prefill.owes_blocks))
        rows = plan.rows + self.prefill.schedule(len(plan.rows), now)
        landing = self.ledger.owners.count(Owner.LANDING) > 0
        self._end_all(self.decode.unstick(bool(rows) or landing or self._pipeline.busy, now))
        if not rows:
            return self.settle() or landed
        if plan.copies:
            self.engine.copy_blocks(plan.copies)
        self._publish(self._pipeline.launch(rows))
        if not lagging:
            self.settle()
        return True

    def settle(self) -> bool:
        """Wait for the step on its way and publish it. False when there is none."""
        busy = self._pipeline.busy
        self._publish(self._pipeline.land())
        return busy

    # ---- what goes out ------------------------------------------------------------------------------------------

    def take_outputs(self) -> dict[int, list[TokenOutput]]:
        """Outputs since the last call, by session; the caller sends them."""
        return self.ledger.outbox.take_tokens()

    def take_notices(self) -> list[tuple[int, Notice]]:
        """Notices since the last call, with their sessions; they are younger than the outputs taken before them."""
        return self.ledger.outbox.take_notices()

    def cache_events(self) -> list[CacheEvent]:
        """What the prefix cache has stored and evicted since the last call."""
        return self.ledger.kv.drain_events()

    def cache_snapshot(self) -> CacheSnapshot:
        """All that the prefix cache has."""
        return self.ledger.kv.snapshot()

    # ---- what there is ------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        return len(self.ledger.legs)

    @property
    def handing_off(self) -> int:
        """Hand-offs from this engine that are open."""
        return self.prefill.handing_off + self.decode.handing_off

    def empty(self) -> bool:
        """True when no request, hand-off or block is held here."""
        return not (self.num_requests or self.handing_off or self.decode.arriving or self._pipeline.busy)

    def load(self, step_s: float) -> EngineLoad:
        """The engine's numbers at the end of a step, for routers and metrics. Cheap enough for every step."""
        counts, owners, ends = self.ledger.kv.counts(), self.ledger.owners, self._agent.counts()
        return EngineLoad(
            waiting_requests=self.prefill.waiting + self.decode.waiting,
            running_requests=self.decode.running,
            queued_prefill_tokens=self.prefill.waiting_tokens,
            running_context_tokens=self.decode.context_tokens,
            free_blocks=counts.free,
            held_blocks=counts.held,
            cached_blocks=counts.cached,
            step_s=step_s,
            sequence_blocks=counts.held - owners.listed,
            hold_blocks=owners.count(Owner.HOLD),
            landing_blocks=owners.count(Owner.LANDING),
            quarantine_blocks=owners.count(Owner.QUARANTINE),
            handoffs_acked=ends.acked,
            handoffs_failed=ends.failed,
            checksum_failures=ends.checksum_failures,
        )

    def audit(self) -> BlockAudit:
        """Every block by its owner, counted anew from what both workers hold; costs a walk over the pool."""
        return self.ledger.audit([*self.prefill.held(), *self.decode.held()])

    # ---- a request begins and ends ------------------------------------------------------------------------------

    def _submit(self, leg: Leg, now: float) -> None:
        legs, request = self.ledger.legs, leg.request
        refusal = self._check.refusal(leg, len(legs))
        if leg.key in legs:
            return  # a duplicate frame; the first one is being served
        if refusal is not None:
            self._end(refusal)
            return
        if request.timeout_s is not None:
            leg.overdue_at_s = now + request.timeout_s + DEADLINE_GRACE_S
        legs.add(leg)
        worker = self.prefill if leg.kind in (LegKind.LOCAL, LegKind.PREFILL) else self.decode
        worker.submit(leg, now)

    def _publish(self, rows: list[LandedRow]) -> None:
        for row in rows:
            if row.row.seq.status is Status.RUNNING:
                self.decode.landed(row)
            elif (prefilled := self.prefill.landed(row)) is not None:
                self.decode.begin(prefilled.leg, prefilled.seq, prefilled.sampled)

    def _abort(self, abort: Abort) -> None:
        for leg in self.ledger.legs.of_request(abort.session_id, abort.request_id):
            if abort.sample is None:
                self._end(Ending(leg, None))
            else:
                self.prefill.withdraw(leg, abort.sample)
                self._end_all(self.decode.abort_sample(leg, abort.sample))

    def _end(self, ending: Ending) -> None:
        """The one transition to the end from any state: every sequence, hand-off and block of the leg goes."""
        leg, reason = ending.leg, ending.error or "aborted"
        self.prefill.end(leg, reason)
        self.decode.end(leg, reason)
        self.ledger.legs.remove(leg)
        if ending.error is not None:
            self.ledger.outbox.refuse(leg, ending.error, ending.cause)

    def _end_all(self, endings: Iterable[Ending]) -> None:
        for ending in endings:
            self._end(ending)


@dataclass(frozen=True, slots=True)
class SubmitCheck:
    """What an engine refuses when it is submitted, before it costs anything.

    `max_tokens` bounds prompt and completion, `max_requests` those that wait or run.
    """

    max_tokens: int
    vocab_size: int
    max_requests: int

    def refusal(self, leg: Leg, num_requests: int) -> Ending | None:
        """Why the engine will not take `leg` beside the `num_requests` that it has; None if it does."""
        context = leg.request.context
        tokens = len(context)
        if not 0 < tokens < self.max_tokens:
            return Ending(leg, f"prompt of {tokens} tokens; this engine takes 1 to {self.max_tokens - 1}")
        if not 0 <= min(context) <= max(context) < self.vocab_size:
            return Ending(leg, f"token id out of vocabulary (0 to {self.vocab_size - 1})")
        if num_requests >= self.max_requests:
            return Ending(leg, f"engine queue is full ({num_requests} requests)", ErrorCause.QUEUE_FULL)
        return None
