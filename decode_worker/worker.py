"""Everything of a decode leg: samples that decode at one engine, from their KV's arrival here to their end.

    a computed prompt, forked ─┐                  ┌─> finished, aborted
    KV that landed ────────────┼─> live, running ─┼─> migrated: another engine decodes it
    a preempted one, again ────┘                  └─> preempted: still live, its blocks given up

`end` takes a leg out of any of these states, `end_sample` one of its samples.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.decode_worker.arrivals import Arrivals
from kvbaton.decode_worker.migration import Migrations
from kvbaton.decode_worker.scheduler import DecodePlan, DecodeScheduler
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.block_owners import Holding
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import Migrate, Migrated, MigrationWanted
from kvbaton.engine.sampling.device_sampler import is_plain
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import LandedRow
from kvbaton.kvtransfer.messages import Event, Failed, Granted, HandoffCommands, Landed, Offered, Released


class DecodeWorker:
    """Owns every sample of one engine (`Leg.live` names them), those on their way to it, and those that leave it."""

    def __init__(self, ledger: Ledger, agent: HandoffCommands, limits: BatchConfig) -> None:
        self._ledger = ledger
        self.scheduler = DecodeScheduler(ledger.kv, limits.max_running, ledger.max_tokens)
        self.arrivals = Arrivals(ledger, agent, self.scheduler)
        self.migrations = Migrations(ledger, agent, self.scheduler)

    @property
    def running(self) -> int:
        """Samples in the running batch."""
        return len(self.scheduler.running)

    @property
    def context_tokens(self) -> int:
        """Tokens of the running batch, prompts included."""
        return sum(len(seq.tokens) for seq in self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Hand-offs that wait for room here."""
        return self.arrivals.waiting

    @property
    def arriving(self) -> int:
        """Hand-offs to this engine that are expected or open."""
        return len(self.arrivals)

    @property
    def handing_off(self) -> int:
        """Hand-offs of migrations that are open, those of migrations that are over included."""
        return len(self.migrations.outgoing)

    def held(self) -> Iterator[Holding]:
        """The blocks of samples, of what is landing, and of migrations."""
        yield from (Holding(seq.block_table) for leg in self._ledger.legs for seq in leg.live.values())
        yield from self.arrivals.held()
        yield from self.migrations.held()

    # ---- what comes in ------------------------------------------------------------------------------------------

    def submit(self, leg: Leg, now: float) -> None:
        """Expect the KV of a DECODE or MIGRATION leg. No block is reserved yet."""
        self.arrivals.expect(leg, now)

    def begin(self, leg: Leg, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """A sequence that was computed at this engine goes on: a prompt's samples, or one that was preempted."""
        if leg.live.get(seq.samples[0]) is seq:
            self.scheduler.add(seq)
            self._next_token(leg, seq, sampled[0])
        else:
            self._fork(leg, seq, sampled)

    def event(self, event: Event, now: float) -> list[Ending]:
        """Take an event about a hand-off to this engine or a migration from it; others are ignored."""
        match event:
            case Offered():
                self.arrivals.offered(event, now)
            case Landed():
                return self.arrivals.landed(event, now)
            case Granted():
                self.migrations.granted(event, now)
            case Failed():
                self.migrations.failed(event)
                return self.arrivals.failed(event)
            case Released():
                self.arrivals.released(event)
                if (migrated := self.migrations.released(event)) is not None:
                    self.end_sample(migrated.leg, migrated.seq)
        return []

    def migrate(self, session_id: int, order: Migrate) -> None:
        """An ingress has one of its samples migrated, or calls that off; it is told how that ends."""
        if order.to is None:
            self.migrations.stop_named(order.key, "called off")
            return
        legs = self._ledger.legs.of_request(session_id, order.request_id)
        leg = next((leg for leg in legs if order.sample in leg.live), None)
        refusal: str | None = "no such sample decodes here"
        if leg is not None:
            refusal = self.migrations.start(leg, leg.live[order.sample], order)
        if refusal is not None:
            self._ledger.outbox.notice(session_id, Migrated(order.new_id, order.new_epoch, refusal))

    def evacuate(self, request_id: str | None, to: str | None) -> None:
        """Ask the ingresses to have a request (None: every request) go on at engine `to`, None: anywhere else."""
        for leg in self._ledger.legs.named(request_id):
            self._ledger.outbox.notice(leg.session_id, MigrationWanted(leg.request.request_id, to))

    # ---- a step -------------------------------------------------------------------------------------------------

    def may_lag(self) -> bool:
        """Whether the next step can be scheduled before the last one has landed: nobody has to give way for it, nobody
        is migrating and takes the newest tokens along, and no next token depends on the last but through the model."""
        return not len(self.migrations) and self.scheduler.has_room() and all(map(is_plain, self.scheduler.running))

    def overdue(self, now: float) -> list[Ending]:
        """Legs whose sequence never came."""
        return self.arrivals.overdue(now)

    def schedule(self, now: float) -> DecodePlan:
        """A row for each running sample; those that gave their blocks up for it are computed again."""
        self.migrations.advance(now)
        plan = self.scheduler.schedule()
        for seq in plan.preempted:
            self.migrations.stop(seq, "preempted")
        return plan

    def grant(self, closed: bool) -> list[Ending]:
        """Give landing blocks to the hand-offs that wait for them, to none while `closed`. Returns legs that would not
        wait and got none."""
        return self.arrivals.grant(closed, self._ledger.pipeline.joining())

    def unstick(self, progress: bool, now: float) -> list[Ending]:
        """A leg to give up where there has been no `progress` for a while: engines may be waiting for each other."""
        return self.arrivals.unstick(progress, now)

    def landed(self, landed: LandedRow) -> None:
        """Account for a decode row that ran, and publish its token."""
        seq = landed.row.seq
        self.scheduler.commit(landed.row)
        self._next_token(self._ledger.legs.of(seq), seq, landed.sampled[0])

    # ---- an end -------------------------------------------------------------------------------------------------

    def end(self, leg: Leg, reason: str) -> None:
        """End every sample of a leg, and whatever of it is still to come."""
        for seq in list(leg.live.values()):
            self.end_sample(leg, seq)
        self.arrivals.cancel(leg, reason)

    def abort_sample(self, leg: Leg, sample: int) -> list[Ending]:
        """End one sample, also one that is not here yet; the leg ends with the last."""
        if sample in leg.live:
            self.end_sample(leg, leg.live[sample])
            return []
        leg.dropped.add(sample)
        return [Ending(leg, None)] if leg.dropped.issuperset(leg.request.sample_indices) else []

    def end_sample(self, leg: Leg, seq: Sequence) -> None:
        """A sample ends: its blocks go back, and its leg goes with the last one."""
        self.migrations.forget(seq, "the sequence ended")
        if seq.status is Status.RUNNING:
            self.scheduler.remove(seq)
        seq.to(Status.FINISHED)
        self._ledger.pipeline.free(seq)
        del leg.live[seq.samples[0]]
        self._end_if_last(leg)

    def _fork(self, leg: Leg, prompt: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """The samples of a prompt share its blocks until they write."""
        drawn = {
            sample: token for sample, token in zip(prompt.samples, sampled, strict=True) if sample not in leg.dropped
        }
        for sample in drawn:
            live = leg.live[sample] = prompt.branch(sample)
            self._ledger.kv.fork(live.block_table)
            self.scheduler.add(live)
        for sample, token in drawn.items():
            self._next_token(leg, leg.live[sample], token)
        self._ledger.kv.free(prompt.block_table)
        self._end_if_last(leg)

    def _next_token(self, leg: Leg, seq: Sequence, drawn: SampledToken) -> None:
        if self._ledger.outbox.publish(leg, seq, drawn) is not None:
            self.end_sample(leg, seq)

    def _end_if_last(self, leg: Leg) -> None:
        if not leg.live and leg.prompt is None:
            self._ledger.legs.remove(leg)
