"""One engine in a role: what happens to requests between two forward passes. Single-threaded, no Ray, no sockets.

A step is schedule, launch, publish (often the step before: `StepPipeline`). Decode rows go first, prefill chunks fill
the rest of the token budget, both in one forward pass. A role only decides what the router sends here: it is no state.

    LOCAL leg     prefill queue -> running here
    PREFILL leg   prefill queue -> first token to the ingress, KV held for the peer -> ack
    DECODE leg    landing -> running here
    MIGRATE leg      landing of a copy, then of the rest -> running here; at its source it is a `Migrations` entry

Prompts are kept by `WorkerPrompts`, what decodes by `WorkerSamples`, what others send here by `Arrivals`.
"""

from __future__ import annotations

from kvbaton.cluster.host.inbox import Item
from kvbaton.cluster.host.load import engine_load
from kvbaton.cluster.host.submit_check import SubmitCheck
from kvbaton.decode_worker.arrivals import Arrivals, branch
from kvbaton.decode_worker.incoming import Landings
from kvbaton.decode_worker.samples import WorkerSamples
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.batch import SampledToken, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.first_tokens import encode_first_tokens
from kvbaton.engine.kv.block_audit import audit_blocks
from kvbaton.engine.kv.block_owners import BlockAudit, BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Leg, Legs
from kvbaton.engine.orders import Abort, Evacuate, LegKind, MigrationOrdered, MigrationWanted, Submitted
from kvbaton.engine.outgoing import OutgoingHandoffs, OutgoingState
from kvbaton.engine.request import TokenOutput
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import LandedRow, StepEngine, StepPipeline
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import Cause, Failed, Granted, Landed, Offered, Released
from kvbaton.prefill_worker.prompts import WorkerPrompts
from kvbaton.router.engine_info import EngineLoad

DEADLINE_GRACE_S = 1.0  # the ingress is nearer to the client: it is first to say that the time is up


class Worker:
    """Owns every sequence, hand-off and block of one engine. All calls come from the engine thread."""

    def __init__(self, engine: StepEngine, agent: HandoffCommands, limits: BatchConfig) -> None:
        self._engine = engine
        self._agent = agent
        # A sequence that outgrew the whole pool could be preempted but never computed again.
        kv, max_tokens = engine.kv, min(engine.max_model_len, engine.kv.num_blocks * engine.kv.block_size)
        self.max_requests = limits.max_waiting + limits.max_running
        self._check = SubmitCheck(max_tokens, engine.vocab_size, self.max_requests)
        self.legs = Legs()
        self.owners = BlockOwners()
        self.pipeline = StepPipeline(kv, engine.pipelined)
        self.outgoing = OutgoingHandoffs(kv, agent, self.owners)
        self.prompts = WorkerPrompts(kv, limits, self.legs, self.outgoing, self.pipeline)
        self.prefill = self.prompts.scheduler
        self.decode = DecodeScheduler(kv, limits.max_running, max_tokens)
        self.landings = Landings(kv, agent, self.owners)
        self.arrivals = Arrivals(engine, self.legs, self.landings, self.decode)
        self.samples = WorkerSamples(kv, max_tokens, self.legs, self.prefill, self.decode, self.pipeline, self.outgoing)
        self.migrations, self.outbox = self.samples.migrations, self.samples.outbox

    # ---- what comes in ------------------------------------------------------------------------------------------

    def handle(self, item: Item, now: float) -> None:
        """Apply one command of an ingress or one event of the transfer agent."""
        match item:
            case Submitted():
                self._submit(Leg(item.session_id, item.submit), now)
            case Abort():
                self._abort(item)
            case Offered():
                self.landings.offered(item, now)
            case Landed():
                self._landed(item, now)
            case Failed():
                self._handoff_failed(item)
            case Released():
                self._released(item)
            case Granted():
                self.migrations.granted(item.key, now)  # for others the agent sends ready blocks by itself
            case MigrationOrdered():
                self.samples.migrate(item.session_id, item.order)
            case Evacuate():
                for leg in self.legs.named(item.request_id):
                    self.outbox.notice(leg.session_id, MigrationWanted(leg.request.request_id, item.to))

    def step(self, now: float) -> bool:
        """Schedule, launch, publish into the outbox. False when there was nothing to run."""
        lagging = self.pipeline.may_lag(self.decode, len(self.migrations) > 0)
        landed = not lagging and self.settle()
        self._end_all(self.arrivals.overdue(now), "the sequence to take over never came")
        self._end_all(self.legs.overdue(now), "the request's time is up")
        self.migrations.advance(now)
        plan = self.decode.schedule()
        for seq in plan.preempted:
            self.prefill.add(seq)
            self.migrations.stop(seq, "preempted")
        # Streams that gave their blocks up get them back before others get any.
        refused = self.arrivals.grant(bool(plan.preempted) or self.prefill.queue.preempted, self.pipeline.joining())
        self._end_all(refused, "no room for a sequence that decodes elsewhere")
        rows = plan.rows + self.prompts.rows(len(plan.rows), now)
        stuck = self.arrivals.circle(now, bool(rows) or self.pipeline.busy or self.owners.count(Owner.LANDING) > 0)
        self._end_all(stuck, "no room: every block here waits for other engines")
        if not rows:
            return self.settle() or landed
        if plan.copies:
            self._engine.copy_blocks(plan.copies)
        self._landed_rows(self.pipeline.launch(self._engine, rows))
        if not lagging:
            self.settle()
        return True

    def settle(self) -> bool:
        """Wait for the step on its way and publish it. False when there is none."""
        busy = self.pipeline.busy
        self._landed_rows(self.pipeline.land())
        return busy

    def _landed_rows(self, rows: list[LandedRow]) -> None:
        for landed in rows:
            row, seq = landed.row, landed.row.seq
            leg = self.legs.of(seq)
            if leg is None:
                raise RuntimeError(f"request {seq.request.request_id} ran without being tracked")
            leg.prompt_logprobs.extend(landed.prompt_logprobs or ())
            if seq.status is Status.RUNNING:
                self.decode.commit(row)
                self.samples.next_token(leg, seq, landed.sampled[0])
            else:
                self._prefilled(leg, row, landed.sampled)

    def take_outputs(self) -> dict[int, list[TokenOutput]]:
        """Outputs since the last call, by session; the caller sends them."""
        return self.outbox.take_tokens()

    def empty(self) -> bool:
        """True when no request, hand-off or block is held here. Other threads may ask."""
        return not (len(self.legs) or len(self.outgoing) or len(self.landings) or self.pipeline.busy)

    def load(self, step_s: float) -> EngineLoad:
        waiting = self.landings.waiting()
        counts, queue = self._engine.kv.counts(), self.prefill.queue
        return engine_load(counts, self.owners, queue, self.decode.running, waiting, self._agent.counts(), step_s)

    def audit(self) -> BlockAudit:
        """Every block by its owner, counted anew from the sequences and hand-offs; costs a walk over the pool."""
        tables = [*self.legs.block_tables(), *self.pipeline.parked()]
        handoffs = [*self.outgoing.held(), *self.landings.held()]
        return audit_blocks(self._engine.kv, self.owners, tables, handoffs, self.pipeline.written())

    @property
    def kv(self) -> KVManager:
        return self._engine.kv

    # ---- a request begins ---------------------------------------------------------------------------------------

    def _submit(self, leg: Leg, now: float) -> None:
        refusal = self._check.refusal(leg.request, len(self.legs))
        if leg.key in self.legs:
            return  # a duplicate frame; the first one is being served
        if refusal is not None:
            self._end_request(leg, refusal)
            return
        if leg.request.timeout_s is not None:
            leg.overdue_at_s = now + leg.request.timeout_s + DEADLINE_GRACE_S
        self.legs.add(leg)
        if leg.kind in (LegKind.DECODE, LegKind.MIGRATION):
            self.arrivals.expect(leg, now)
        else:
            self.prompts.add(leg, now)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _prefilled(self, leg: Leg, row: ScheduledRow, sampled: tuple[SampledToken, ...]) -> None:
        progress = self.prefill.commit(row)
        if not progress.done:
            if leg.kind is LegKind.PREFILL:
                self.outgoing.chunk_done(row.seq, progress.full_blocks)
        elif row.seq is not leg.prompt:
            self.samples.resume(leg, row.seq, sampled[0])
        elif leg.kind is LegKind.PREFILL:
            self._hand_off(leg, row.seq, sampled)
        else:
            self.samples.fork(leg, row.seq, sampled)

    def _hand_off(self, leg: Leg, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """Publish the first tokens at once; what goes on goes to decode with the tail block."""
        going_on: dict[int, int] = {}
        for sample, drawn in zip(seq.samples, sampled, strict=True):
            if self.samples.publish(leg, branch(seq, sample), drawn) is None:
                going_on[sample] = drawn.token_id
        leg.prompt = None
        if going_on:
            self.outgoing.complete(seq, encode_first_tokens(going_on))  # the leg stays until the ack
        else:
            self.legs.remove(leg)
            self.outgoing.cancel(leg.key, "finished with its first token", Cause.FINISHED)

    def _landed(self, event: Landed, now: float) -> None:
        try:
            self.arrivals.landed(event, now)
        except ValueError as error:
            leg = self.arrivals.leg_of(event.key)
            if leg is not None:
                self._end_request(leg, f"hand-off refused: {error}")

    # ---- a request ends -----------------------------------------------------------------------------------------

    def _end_request(self, leg: Leg, error: str | None, reason: str = "aborted") -> None:
        """The one transition to the end from any state: every leg and block goes; `error` is told to the ingress."""
        for seq in list(leg.live.values()):
            self.samples.end(leg, seq)
        self.arrivals.cancel(leg, error or reason)
        self.prompts.drop(leg)
        if leg.kind is LegKind.PREFILL:
            self.outgoing.cancel(leg.key, error or reason)
        self.legs.remove(leg)
        if error is not None:
            self.outbox.refuse(leg, error)

    def _end_all(self, legs: list[Leg], error: str) -> None:
        for leg in legs:
            self._end_request(leg, error)

    def _abort(self, abort: Abort) -> None:
        for leg in self.legs.of_request(abort.session_id, abort.request_id):
            if abort.sample is None:
                self._end_request(leg, None)
            else:
                self._abort_sample(leg, abort.sample)

    def _abort_sample(self, leg: Leg, sample: int) -> None:
        if sample in leg.live:
            self.samples.end(leg, leg.live[sample])
            return
        leg.dropped.add(sample)
        if leg.dropped.issuperset(leg.request.sample_indices):
            self._end_request(leg, None)

    def _handoff_failed(self, event: Failed) -> None:
        sender = self.outgoing.failed(event.key) is not None
        self.migrations.failed(event.key, event.reason)
        receiving = self.arrivals.failed(event.key)
        leg = self.legs.get(event.key) if sender else receiving
        if leg is None:
            return
        self._end_request(leg, None if event.cause is Cause.FINISHED else event.reason)

    def _released(self, event: Released) -> None:
        """The network touches the hand-off's blocks no more; at prefill this also ends the request."""
        if self.outgoing.state(event.key) is OutgoingState.CLOSING:
            self.settle()  # a chunk of it may be on its way
        self.landings.released(event.key)
        leg = self.legs.get(event.key)
        if self.outgoing.released(event.key) is not None and leg is not None and leg.kind is LegKind.PREFILL:
            self.legs.remove(leg)
        self.migrations.released(event.key, event.acked)
