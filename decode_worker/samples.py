"""The samples that decode at one engine, from their first token here to their end: a last one, an abort, a migration.

a computed prompt, forked ─┐                  ┌─> finished, aborted
KV that landed ────────────┼─> live, running ─┼─> migrated: another engine decodes it
a preempted one, again ────┘                  └─> preempted: still live, its blocks given up
"""

from __future__ import annotations

from kvbaton.decode_worker.arrivals import branch
from kvbaton.decode_worker.migration import Migration, Migrations
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Leg, Legs
from kvbaton.engine.orders import Migrate, Migrated
from kvbaton.engine.outbox import Outbox
from kvbaton.engine.outgoing import OutgoingHandoffs
from kvbaton.engine.request import FinishReason
from kvbaton.engine.sampling.stopping import finish_reason
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import StepPipeline
from kvbaton.kvtransfer.messages import HandoffKey
from kvbaton.prefill_worker.scheduler import PrefillScheduler


class WorkerSamples:
    """`Leg.live` names them; `migrations` are those that are leaving. `max_tokens` bounds prompt and completion."""

    def __init__(
        self,
        kv: KVManager,
        max_tokens: int,
        legs: Legs,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        pipeline: StepPipeline,
        outgoing: OutgoingHandoffs,
    ) -> None:
        self._kv = kv
        self._max_tokens = max_tokens
        self._legs = legs
        self._prefill = prefill
        self._decode = decode
        self._pipeline = pipeline
        self.migrations = Migrations(kv, decode, outgoing, self._migration_ended)
        self.outbox = Outbox()

    def fork(self, leg: Leg, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """The samples of a prompt that was computed here share its blocks until they write."""
        leg.prompt = None
        for sample in seq.samples:
            live = leg.live[sample] = branch(seq, sample)
            self._kv.fork(live.block_table)
            self._decode.add(live)
        for live, drawn in zip(list(leg.live.values()), sampled, strict=True):
            self.next_token(leg, live, drawn)
        self._kv.release(seq.block_table)
        seq.block_table = []

    def resume(self, leg: Leg, seq: Sequence, drawn: SampledToken) -> None:
        """Computed again after a preemption: one sample, which goes on where it was."""
        self._decode.add(seq)
        self.next_token(leg, seq, drawn)

    def next_token(self, leg: Leg, seq: Sequence, drawn: SampledToken) -> None:
        if self.publish(leg, seq, drawn) is not None:
            self.end(leg, seq)

    def publish(self, leg: Leg, seq: Sequence, drawn: SampledToken) -> FinishReason | None:
        """Append a drawn token to its sequence and queue it for the ingress; returns why it was the last, if it was."""
        seq.tokens.append(drawn.token_id)
        finish = finish_reason(seq, self._max_tokens)
        self.outbox.token(leg, seq, drawn, finish)
        return finish

    def end(self, leg: Leg, seq: Sequence) -> None:
        """A running or preempted sample ends: its blocks go back, and the leg with the last one."""
        self.migrations.forget(seq, "the sequence ended")
        if seq.status is Status.RUNNING:
            self._decode.remove(seq)
        elif seq in self._prefill.queue:
            self._prefill.remove(seq)
        seq.to(Status.FINISHED)
        self._pipeline.give_back(seq)
        del leg.live[seq.samples[0]]
        if not leg.live and leg.prompt is None:
            self._legs.remove(leg)

    def migrate(self, session_id: int, order: Migrate) -> None:
        """An ingress has one of its samples migrated away, or calls that off; it is told how that ends."""
        key = HandoffKey(order.new_id, order.new_epoch)
        if order.to is None:
            self.migrations.stop_named(key, "called off")
            return
        legs = self._legs.of_request(session_id, order.request_id)
        leg = next((t for t in legs if order.sample in t.live), None)
        refusal = "no such sample decodes here"
        if leg is not None:
            refusal = self.migrations.start(leg, leg.live[order.sample], order)
        if refusal:
            self.outbox.notice(session_id, Migrated(order.new_id, order.new_epoch, refusal))

    def _migration_ended(self, migration: Migration, migrated: bool, reason: str) -> None:
        order = migration.order
        if migrated:
            self.end(migration.leg, migration.seq)
        self.outbox.notice(
            migration.leg.session_id, Migrated(order.new_id, order.new_epoch, None if migrated else reason)
        )
