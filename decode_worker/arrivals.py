"""What arrives at one engine from others: prompts that were computed there, and sequences that were decoding there.

    DECODE leg    the prompt's KV lands: its samples join the running batch with the tokens that prefill drew
    MOVE leg      a copy of the whole blocks lands, then the rest with the newest tokens: the sample joins

Methods return the requests that cannot go on; the worker ends them.
"""

from __future__ import annotations

from kvbaton.cluster.host.commands import StepEngine
from kvbaton.cluster.session.types import Leg
from kvbaton.decode_worker.incoming import Landings
from kvbaton.decode_worker.migration import COPY_SUFFIX, copied_blocks, copy_key, copy_request
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.first_tokens import decode_first_tokens
from kvbaton.engine.legs import Track, Tracks
from kvbaton.engine.moved_tokens import decode_moved_tokens
from kvbaton.engine.sequence import Sequence
from kvbaton.kvtransfer.messages import HandoffKey, Landed

STUCK_S = 2.0


class Arrivals:
    """The hand-offs that this engine receives, as far as they concern its requests."""

    def __init__(self, engine: StepEngine, tracks: Tracks, landings: Landings, decode: DecodeScheduler) -> None:
        self._engine = engine
        self._tracks = tracks
        self._landings = landings
        self._decode = decode
        self._moving_at_s = 0.0

    def expect(self, track: Track, now: float) -> None:
        """A DECODE or MOVE leg was submitted."""
        request, size = track.request, self._engine.kv.block_size
        if track.leg is Leg.DECODE:
            self._landings.expect(request, now)
        elif count := copied_blocks(len(request.context), size):
            self._landings.expect(copy_request(request, count * size), now, patient=False)
        else:
            self._landings.expect_move(request, [], now)

    def grant(self, closed: bool, joining: int) -> list[Track]:
        """Landing blocks for those who wait for them, a block left for each who runs and for `joining` who soon will.
        Returns moves for which there is no room."""
        if not self._landings.waiting():
            return []
        return self._tracks_of(self._landings.grant_waiting(len(self._decode.running) + joining, closed))

    def overdue(self, now: float) -> list[Track]:
        """Moves whose sequence never came."""
        return self._tracks_of(self._landings.expire(now))

    def circle(self, now: float, moving: bool) -> list[Track]:
        """Where nothing is `moving`, neither runs nor lands, every held block waits for a peer, who may be waiting for
        one of ours. Returns a request to refuse after a while: its engine gets the blocks of that prompt back."""
        stuck = None if moving else self._landings.oldest_waiting()
        if stuck is None:
            self._moving_at_s = now
        elif now - self._moving_at_s > STUCK_S:
            self._moving_at_s = now
            return self._tracks_of([stuck])
        return []

    def landed(self, event: Landed, now: float) -> Track | None:
        """Take over what is complete here; returns its request. Raises `ValueError` for a payload that cannot be."""
        track = self.track_of(event.key)
        if track is None:
            return None
        if track.leg is Leg.MOVE:
            self._move_landed(track, event, now)
        else:
            self._prompt_landed(track, event)
        return track

    def failed(self, key: HandoffKey) -> Track | None:
        """The agent gave a hand-off up. Returns its request, if that is news."""
        return self.track_of(key) if self._landings.failed(key) else None

    def cancel(self, track: Track, reason: str) -> None:
        """The request ends: whatever of it is on its way, or will be, is not wanted any more."""
        if track.leg in (Leg.DECODE, Leg.MOVE):
            self._landings.cancel(track.key, reason)
        if track.leg is Leg.MOVE:
            self._landings.cancel(copy_key(track.key), reason)

    def track_of(self, key: HandoffKey) -> Track | None:
        """The request that a hand-off belongs to; a move's copy has a name of its own."""
        track = self._tracks.get(key)
        if track is None and key.request_id.endswith(COPY_SUFFIX):
            track = self._tracks.get(HandoffKey(key.request_id.removesuffix(COPY_SUFFIX), key.epoch))
            return track if track is not None and track.leg is Leg.MOVE else None
        return track

    def _prompt_landed(self, track: Track, event: Landed) -> None:
        first = decode_first_tokens(event.payload)
        seq = self._landings.landed(event.key)
        if seq is None:
            return
        for sample, token_id in first.items():
            if sample in track.dropped:
                continue  # aborted alone while the KV travelled
            sample_seq = branch(seq, sample)
            sample_seq.tokens.append(token_id)
            self._engine.kv.fork(sample_seq.block_table)
            track.live[sample] = sample_seq
            self._decode.add(sample_seq)
        self._engine.kv.release(seq.block_table)
        seq.block_table = []
        if not track.live:
            self._tracks.remove(track)

    def _move_landed(self, track: Track, event: Landed, now: float) -> None:
        if event.key != track.key:
            copied = self._landings.landed(event.key)
            if copied is not None:
                self._landings.expect_move(track.request, copied.block_table, now)
            return
        seq = self._landings.landed(event.key, decode_moved_tokens(event.payload, self._engine.vocab_size))
        if seq is not None:
            track.live[seq.samples[0]] = seq
            self._decode.add(seq)

    def _tracks_of(self, keys: list[HandoffKey]) -> list[Track]:
        return [track for key in keys if (track := self.track_of(key)) is not None]


def branch(seq: Sequence, sample: int) -> Sequence:
    """One sample of a computed prompt, sharing its block table's blocks (the caller forks their counts)."""
    one = Sequence(seq.request, seq.arrival_s, (sample,))
    one.block_table = list(seq.block_table)
    one.num_computed = seq.num_computed
    one.cached_tokens = seq.cached_tokens
    return one
