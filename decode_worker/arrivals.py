"""What comes to one engine from others: prompts that were computed there, and sequences that were decoding there.

DECODE leg      the prompt's KV lands: its samples join the running batch with the tokens that prefill drew
MIGRATION leg   a copy of the whole blocks lands, then the rest with the newest tokens: the sample joins
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvbaton.decode_worker.incoming import Expected, IncomingHandoffs
from kvbaton.decode_worker.migration import copied_blocks
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.handoff_payload import decode_first_tokens, decode_newest_tokens
from kvbaton.engine.kv.block_owners import Holding
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import LegKind
from kvbaton.engine.sequence import Sequence
from kvbaton.kvtransfer.messages import Cause, Failed, HandoffCommands, HandoffKey, Landed, Offered, Released

STUCK_S = 2.0


@dataclass(slots=True)
class _Coming:
    """A sequence whose KV is on its way. `copied` blocks of a migrated one come first, in a hand-off of their own;
    0 once they are here."""

    leg: Leg
    seq: Sequence
    copied: int = 0


class Arrivals:
    """DECODE and MIGRATION legs from their submit until their samples run."""

    def __init__(self, ledger: Ledger, agent: HandoffCommands, scheduler: DecodeScheduler) -> None:
        self._ledger = ledger
        self._kv = ledger.kv
        self._scheduler = scheduler
        self.incoming = IncomingHandoffs(ledger.kv, agent, ledger.owners)
        self._coming: dict[HandoffKey, _Coming] = {}
        self._progress_at_s = 0.0

    def __len__(self) -> int:
        """Hand-offs that are expected, offered, landing or closing."""
        return len(self.incoming)

    @property
    def waiting(self) -> int:
        """Offers that wait for room."""
        return self.incoming.waiting()

    def held(self) -> Iterator[Holding]:
        return self.incoming.held()

    def expect(self, leg: Leg, now: float) -> None:
        """A DECODE or MIGRATION leg was submitted."""
        seq, size = Sequence(leg.request, now), self._kv.block_size
        coming = self._coming[leg.key] = _Coming(leg, seq)
        if leg.kind is LegKind.DECODE:
            tokens = len(seq.tokens)
            self.incoming.expect(leg.key, Expected(tokens, seq.hashes(size, tokens // size)), now)
        elif count := copied_blocks(len(seq.tokens), size):
            coming.copied = count
            self.incoming.expect(leg.key, Expected(count * size, seq.hashes(size, count), patient=False), now)
        else:
            self.incoming.expect(leg.key, Expected(None, patient=False), now)

    def offered(self, event: Offered, now: float) -> None:
        self.incoming.offered(event, now)

    def landed(self, event: Landed, now: float) -> list[Ending]:
        """Take over what is complete here. A payload that cannot be ends its leg."""
        coming = self._coming.get(event.key)
        if coming is None:
            return []
        try:
            if coming.leg.kind is LegKind.DECODE:
                self._prompt_landed(coming, event)
            elif coming.copied:
                self._copy_landed(coming, now)
            else:
                self._rest_landed(coming, event)
        except ValueError as error:
            return [Ending(coming.leg, f"hand-off refused: {error}")]
        return []

    def failed(self, event: Failed) -> list[Ending]:
        """The agent gave a hand-off up, or its sender did."""
        coming = self._coming.get(event.key)
        if not self.incoming.failed(event.key) or coming is None:
            return []
        return [Ending(coming.leg, None if event.cause is Cause.FINISHED else event.reason)]

    def released(self, event: Released) -> None:
        self.incoming.released(event.key)

    def grant(self, closed: bool, joining: int) -> list[Ending]:
        """Landing blocks for those who wait for them, none while `closed`; a block is left for each who runs and for
        `joining` who soon will. Returns migrations for which there is no room."""
        if not self.waiting:
            return []
        refused = self.incoming.grant_waiting(len(self._scheduler.running) + joining, closed)
        return self._endings(refused, "no room for a sequence that decodes elsewhere")

    def overdue(self, now: float) -> list[Ending]:
        """Migrations whose sequence never came."""
        return self._endings(self.incoming.expire(now), "the sequence to take over never came")

    def unstick(self, progress: bool, now: float) -> list[Ending]:
        """Without `progress`, where nothing runs or lands, every held block waits for a peer, who may be waiting for
        one of ours. Ends a leg after a while: its engine gets the blocks of that prompt back."""
        stuck = None if progress else self.incoming.oldest_waiting()
        if stuck is None:
            self._progress_at_s = now
        elif now - self._progress_at_s > STUCK_S:
            self._progress_at_s = now
            return self._endings([stuck], "no room: every block here waits for other engines")
        return []

    def cancel(self, leg: Leg, reason: str) -> None:
        """The leg ends: whatever of it is on its way, or will be, is not wanted any more."""
        if leg.kind in (LegKind.DECODE, LegKind.MIGRATION):
            self._coming.pop(leg.key, None)
            self.incoming.cancel(leg.key, reason)

    def _prompt_landed(self, coming: _Coming, event: Landed) -> None:
        first = decode_first_tokens(event.payload)
        leg, seq = coming.leg, coming.seq
        if not self._take(seq, leg.key, len(seq.tokens)):
            return
        del self._coming[leg.key]
        for sample, token_id in first.items():
            if sample in leg.dropped:
                continue  # aborted alone while the KV travelled
            live = leg.live[sample] = seq.branch(sample)
            live.tokens.append(token_id)
            self._kv.fork(live.block_table)
            self._scheduler.add(live)
        self._kv.free(seq.block_table)
        if not leg.live:
            self._ledger.legs.remove(leg)

    def _copy_landed(self, coming: _Coming, now: float) -> None:
        key, size = coming.leg.key, self._kv.block_size
        blocks = self.incoming.landed(key, coming.copied * size)
        if blocks is not None:
            self._kv.commit(coming.seq.hashes(size, len(blocks)), blocks)
            coming.copied = 0
            self.incoming.expect(key, Expected(None, patient=False), now, blocks)

    def _rest_landed(self, coming: _Coming, event: Landed) -> None:
        leg, seq = coming.leg, coming.seq
        seq.tokens.extend(decode_newest_tokens(event.payload, self._ledger.vocab_size))
        if self._take(seq, leg.key, len(seq.tokens) - 1):  # the newest token was drawn and not computed
            del self._coming[leg.key]
            leg.live[seq.samples[0]] = seq
            self._scheduler.add(seq)

    def _take(self, seq: Sequence, key: HandoffKey, num_computed: int) -> bool:
        """Give a sequence the blocks that have landed for it; False if they are not wanted any more."""
        blocks, size = self.incoming.landed(key, num_computed), self._kv.block_size
        if blocks is None:
            return False
        seq.block_table, seq.num_computed = blocks, num_computed
        full = num_computed // size
        self._kv.commit(seq.hashes(size, full), blocks[:full])
        return True

    def _endings(self, keys: Iterable[HandoffKey], error: str) -> list[Ending]:
        return [Ending(self._coming[key].leg, error) for key in keys if key in self._coming]
