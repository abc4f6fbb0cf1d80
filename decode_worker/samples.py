"""The samples that decode at one engine, from their first token here to their end: a last one, an abort, a move away.

a computed prompt, forked ─┐                  ┌─> finished, aborted
KV that landed ────────────┼─> live, running ─┼─> moved: another engine decodes it
a preempted one, again ────┘                  └─> preempted: still live, its blocks given up
"""

from __future__ import annotations

from kvbaton.cluster.session.types import Move, Moved
from kvbaton.decode_worker.arrivals import branch
from kvbaton.decode_worker.migration import Moves, OutgoingMove
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Track, Tracks
from kvbaton.engine.outbox import Outbox
from kvbaton.engine.outgoing import OutgoingHandoffs
from kvbaton.engine.request import FinishReason
from kvbaton.engine.sampling.stopping import finish_reason
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import StepPipeline
from kvbaton.kvtransfer.messages import HandoffKey
from kvbaton.prefill_worker.scheduler import PrefillScheduler


class WorkerSamples:
    """`Track.live` names them; `moves` are those that are leaving. `max_tokens` bounds prompt and completion."""

    def __init__(
        self,
        kv: KVManager,
        max_tokens: int,
        tracks: Tracks,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        pipeline: StepPipeline,
        outgoing: OutgoingHandoffs,
    ) -> None:
        self._kv = kv
        self._max_tokens = max_tokens
        self._tracks = tracks
        self._prefill = prefill
        self._decode = decode
        self._pipeline = pipeline
        self.moves = Moves(kv, decode, outgoing, self._move_ended)
        self.outbox = Outbox()

    def fork(self, track: Track, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """The samples of a prompt that was computed here share its blocks until they write."""
        track.prompt = None
        for sample in seq.samples:
            live = track.live[sample] = branch(seq, sample)
            self._kv.fork(live.block_table)
            self._decode.add(live)
        for live, drawn in zip(list(track.live.values()), sampled, strict=True):
            self.next_token(track, live, drawn)
        self._kv.release(seq.block_table)
        seq.block_table = []

    def resume(self, track: Track, seq: Sequence, drawn: SampledToken) -> None:
        """Computed again after a preemption: one sample, which goes on where it was."""
        self._decode.add(seq)
        self.next_token(track, seq, drawn)

    def next_token(self, track: Track, seq: Sequence, drawn: SampledToken) -> None:
        if self.publish(track, seq, drawn) is not None:
            self.end(track, seq)

    def publish(self, track: Track, seq: Sequence, drawn: SampledToken) -> FinishReason | None:
        """Append a drawn token to its sequence and queue it for the ingress; returns why it was the last, if it was."""
        seq.tokens.append(drawn.token_id)
        finish = finish_reason(seq, self._max_tokens)
        self.outbox.token(track, seq, drawn, finish)
        return finish

    def end(self, track: Track, seq: Sequence) -> None:
        """A running or preempted sample ends: its blocks go back, and the track with the last one."""
        self.moves.forget(seq, "the sequence ended")
        if seq.status is Status.RUNNING:
            self._decode.remove(seq)
        elif seq in self._prefill.queue:
            self._prefill.remove(seq)
        seq.to(Status.FINISHED)
        self._pipeline.give_back(seq)
        del track.live[seq.samples[0]]
        if not track.live and track.prompt is None:
            self._tracks.remove(track)

    def move(self, session_id: int, order: Move) -> None:
        """An ingress has one of its samples moved away, or calls that off; it is told how that ends."""
        key = HandoffKey(order.new_id, order.new_epoch)
        if order.to is None:
            self.moves.stop_named(key, "called off")
            return
        tracks = self._tracks.of_request(session_id, order.request_id)
        track = next((t for t in tracks if order.sample in t.live), None)
        refusal = "no such sample decodes here"
        if track is not None:
            refusal = self.moves.start(track, track.live[order.sample], order)
        if refusal:
            self.outbox.notice(session_id, Moved(order.new_id, order.new_epoch, False, refusal))

    def _move_ended(self, move: OutgoingMove, moved: bool, reason: str) -> None:
        order = move.order
        if moved:
            self.end(move.track, move.seq)
        self.outbox.notice(move.track.session_id, Moved(order.new_id, order.new_epoch, moved, reason))
