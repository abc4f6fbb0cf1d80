"""What arrives at one engine from others: prompts that were computed there, and sequences that were decoding there.

    DECODE leg    the prompt's KV lands: its samples join the running batch with the tokens that prefill drew
    MIGRATE leg      a copy of the whole blocks lands, then the rest with the newest tokens: the sample joins

Methods return the requests that cannot go on; the worker ends them.
"""

from __future__ import annotations

from kvbaton.decode_worker.incoming import Landings
from kvbaton.decode_worker.migration import COPY_SUFFIX, copied_blocks, copy_key, copy_request
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.first_tokens import decode_first_tokens
from kvbaton.engine.legs import Leg, Legs
from kvbaton.engine.moved_tokens import decode_newest_tokens
from kvbaton.engine.orders import LegKind
from kvbaton.engine.sequence import Sequence
from kvbaton.engine.step_pipeline import StepEngine
from kvbaton.kvtransfer.messages import HandoffKey, Landed

STUCK_S = 2.0


class Arrivals:
    """The hand-offs that this engine receives, as far as they concern its requests."""

    def __init__(self, engine: StepEngine, legs: Legs, landings: Landings, decode: DecodeScheduler) -> None:
        self._engine = engine
        self._legs = legs
        self._landings = landings
        self._decode = decode
        self._progress_at_s = 0.0

    def expect(self, leg: Leg, now: float) -> None:
        """A DECODE or MIGRATE leg was submitted."""
        request, size = leg.request, self._engine.kv.block_size
        if leg.kind is LegKind.DECODE:
            self._landings.expect(request, now)
        elif count := copied_blocks(len(request.context), size):
            self._landings.expect(copy_request(request, count * size), now, patient=False)
        else:
            self._landings.expect_migration(request, [], now)

    def grant(self, closed: bool, joining: int) -> list[Leg]:
        """Landing blocks for those who wait for them, a block left for each who runs and for `joining` who soon will.
        Returns migrations for which there is no room."""
        if not self._landings.waiting():
            return []
        return self._legs_of(self._landings.grant_waiting(len(self._decode.running) + joining, closed))

    def overdue(self, now: float) -> list[Leg]:
        """Migrations whose sequence never came."""
        return self._legs_of(self._landings.expire(now))

    def circle(self, now: float, progress: bool) -> list[Leg]:
        """Without `progress`, where nothing runs or lands, every held block waits for a peer, who may be waiting for
        one of ours. Returns a request to refuse after a while: its engine gets the blocks of that prompt back."""
        stuck = None if progress else self._landings.oldest_waiting()
        if stuck is None:
            self._progress_at_s = now
        elif now - self._progress_at_s > STUCK_S:
            self._progress_at_s = now
            return self._legs_of([stuck])
        return []

    def landed(self, event: Landed, now: float) -> Leg | None:
        """Take over what is complete here; returns its request. Raises `ValueError` for a payload that cannot be."""
        leg = self.leg_of(event.key)
        if leg is None:
            return None
        if leg.kind is LegKind.MIGRATION:
            self._migration_landed(leg, event, now)
        else:
            self._prompt_landed(leg, event)
        return leg

    def failed(self, key: HandoffKey) -> Leg | None:
        """The agent gave a hand-off up. Returns its request, if that is news."""
        return self.leg_of(key) if self._landings.failed(key) else None

    def cancel(self, leg: Leg, reason: str) -> None:
        """The request ends: whatever of it is on its way, or will be, is not wanted any more."""
        if leg.kind in (LegKind.DECODE, LegKind.MIGRATION):
            self._landings.cancel(leg.key, reason)
        if leg.kind is LegKind.MIGRATION:
            self._landings.cancel(copy_key(leg.key), reason)

    def leg_of(self, key: HandoffKey) -> Leg | None:
        """The request that a hand-off belongs to; a migration's copy has a name of its own."""
        leg = self._legs.get(key)
        if leg is None and key.request_id.endswith(COPY_SUFFIX):
            leg = self._legs.get(HandoffKey(key.request_id.removesuffix(COPY_SUFFIX), key.epoch))
            return leg if leg is not None and leg.kind is LegKind.MIGRATION else None
        return leg

    def _prompt_landed(self, leg: Leg, event: Landed) -> None:
        first = decode_first_tokens(event.payload)
        seq = self._landings.landed(event.key)
        if seq is None:
            return
        for sample, token_id in first.items():
            if sample in leg.dropped:
                continue  # aborted alone while the KV travelled
            sample_seq = branch(seq, sample)
            sample_seq.tokens.append(token_id)
            self._engine.kv.fork(sample_seq.block_table)
            leg.live[sample] = sample_seq
            self._decode.add(sample_seq)
        self._engine.kv.release(seq.block_table)
        seq.block_table = []
        if not leg.live:
            self._legs.remove(leg)

    def _migration_landed(self, leg: Leg, event: Landed, now: float) -> None:
        if event.key != leg.key:
            copied = self._landings.landed(event.key)
            if copied is not None:
                self._landings.expect_migration(leg.request, copied.block_table, now)
            return
        seq = self._landings.landed(event.key, decode_newest_tokens(event.payload, self._engine.vocab_size))
        if seq is not None:
            leg.live[seq.samples[0]] = seq
            self._decode.add(seq)

    def _legs_of(self, keys: list[HandoffKey]) -> list[Leg]:
        return [leg for key in keys if (leg := self.leg_of(key)) is not None]


def branch(seq: Sequence, sample: int) -> Sequence:
    """One sample of a computed prompt, sharing its block table's blocks (the caller forks their counts)."""
    one = Sequence(seq.request, seq.arrival_s, (sample,))
    one.block_table = list(seq.block_table)
    one.num_computed = seq.num_computed
    one.cached_tokens = seq.cached_tokens
    return one
