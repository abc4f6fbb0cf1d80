"""The prompts that one engine computes: which may begin, what they hold, and how one is dropped.

queued ──blocks, and room among finished prompts──> being computed ──last chunk──> samples here, or a hand-off
    └─────────────────────── drop ───────────────────────┘
"""

from __future__ import annotations

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Leg, Legs
from kvbaton.engine.orders import LegKind
from kvbaton.engine.outgoing import OutgoingHandoffs
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import StepPipeline
from kvbaton.prefill_worker.hold_limit import HoldLimit
from kvbaton.prefill_worker.scheduler import PrefillScheduler


class WorkerPrompts:
    """`scheduler` also has the samples that gave their blocks up and are computed again."""

    def __init__(
        self,
        kv: KVManager,
        limits: BatchConfig,
        legs: Legs,
        outgoing: OutgoingHandoffs,
        pipeline: StepPipeline,
    ) -> None:
        self._limits = limits
        self._legs = legs
        self._outgoing = outgoing
        self._pipeline = pipeline
        self._holds = HoldLimit(outgoing, kv.num_blocks, limits)
        self.scheduler = PrefillScheduler(kv, limits, self._starts, self._may_start)

    def add(self, leg: Leg, now: float) -> None:
        """A LOCAL or PREFILL leg was submitted."""
        leg.prompt = Sequence(leg.request, now)
        self.scheduler.add(leg.prompt)

    def rows(self, decode_rows: int, now: float) -> list[ScheduledRow]:
        """Chunks for what `decode_rows` leave of a step's token budget."""
        budget = self._limits.max_tokens_per_step - decode_rows
        if decode_rows:
            budget = min(budget, self._limits.prefill_chunk_tokens)  # a running stream waits for one chunk at most
        if not len(self.scheduler.queue):
            return []
        self._holds.begin_step()
        return self.scheduler.schedule(budget, now)

    def drop(self, leg: Leg) -> None:
        """A prompt that waits or is being computed; blocks that a hand-off may be reading stay with the hand-off."""
        seq = leg.prompt
        if seq is None:
            return
        self.scheduler.remove(seq)
        seq.to(Status.FINISHED)
        leg.prompt = None
        if leg.key not in self._outgoing:
            self._pipeline.give_back(seq)

    def _may_start(self, seq: Sequence, num_blocks: int) -> bool:
        leg = self._legs.of(seq)
        return leg is None or leg.kind is not LegKind.PREFILL or self._holds.admits(num_blocks)

    def _starts(self, seq: Sequence) -> None:
        leg = self._legs.of(seq)
        if leg is not None and leg.kind is LegKind.PREFILL and leg.submit.peer is not None:
            self._holds.took(len(seq.block_table))
            self._outgoing.start(seq, leg.submit.peer)
