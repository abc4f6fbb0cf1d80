"""The prompts that one engine computes: which may begin, what they hold, and how one is dropped.

queued ──blocks, and room among finished prompts──> being computed ──last chunk──> samples here, or a hand-off
    └─────────────────────── drop ───────────────────────┘
"""

from __future__ import annotations

from kvbaton.cluster.session.types import Leg
from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Track, Tracks
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
        tracks: Tracks,
        outgoing: OutgoingHandoffs,
        pipeline: StepPipeline,
    ) -> None:
        self._limits = limits
        self._tracks = tracks
        self._outgoing = outgoing
        self._pipeline = pipeline
        self._holds = HoldLimit(outgoing, kv.num_blocks, limits)
        self.scheduler = PrefillScheduler(kv, limits, self._starts, self._may_start)

    def add(self, track: Track, now: float) -> None:
        """A LOCAL or PREFILL leg was submitted."""
        track.prompt = Sequence(track.request, now)
        self.scheduler.add(track.prompt)

    def rows(self, decode_rows: int, now: float) -> list[ScheduledRow]:
        """Chunks for what `decode_rows` leave of a step's token budget."""
        budget = self._limits.max_tokens_per_step - decode_rows
        if decode_rows:
            budget = min(budget, self._limits.prefill_chunk_tokens)  # a running stream waits for one chunk at most
        if not len(self.scheduler.queue):
            return []
        self._holds.begin_step()
        return self.scheduler.schedule(budget, now)

    def drop(self, track: Track) -> None:
        """A prompt that waits or is being computed; blocks that a hand-off may be reading stay with the hand-off."""
        seq = track.prompt
        if seq is None:
            return
        self.scheduler.remove(seq)
        seq.to(Status.FINISHED)
        track.prompt = None
        if track.key not in self._outgoing:
            self._pipeline.give_back(seq)

    def _may_start(self, seq: Sequence, num_blocks: int) -> bool:
        track = self._tracks.of(seq)
        return track is None or track.leg is not Leg.PREFILL or self._holds.admits(num_blocks)

    def _starts(self, seq: Sequence) -> None:
        track = self._tracks.of(seq)
        if track is not None and track.leg is Leg.PREFILL and track.submit.peer is not None:
            self._holds.took(len(seq.block_table))
            self._outgoing.start(seq, track.submit.peer)
