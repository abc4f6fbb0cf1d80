"""Hand-offs as the decode engine sees them: when KV may land, where, and who holds the landing blocks.

Two messages start one, in either order: the ingress's SUBMIT (what to decode) and the prefill engine's OFFER (the
prompt has begun to compute). No block is reserved before both are here and the pool has room, so prompts that wait in a
prefill queue cost decode nothing.

    EXPECTED  submit, no offer          EARLY    offer, no submit (dropped after a grace period)
    WAITING   both, no room yet         GRANTED  blocks are held, KV is arriving
    CLOSING   over, waiting until nothing can write the blocks any more
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvbaton.engine.kv_manager import KVManager, OutOfBlocks
from kvbaton.engine.request import Request
from kvbaton.engine.sequence import IllegalTransition, Sequence
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import HandoffKey, Landing, Offered

EARLY_GRACE_S = 10.0


class LandingState(enum.Enum):
    EXPECTED = "expected"
    EARLY = "early"
    WAITING = "waiting"
    GRANTED = "granted"
    CLOSING = "closing"


_LEGAL = {
    LandingState.EXPECTED: frozenset({LandingState.WAITING}),
    LandingState.EARLY: frozenset({LandingState.WAITING, LandingState.CLOSING}),
    LandingState.WAITING: frozenset({LandingState.GRANTED, LandingState.CLOSING}),
    LandingState.GRANTED: frozenset({LandingState.CLOSING}),
    LandingState.CLOSING: frozenset[LandingState](),
}


@dataclass(slots=True)
class _Incoming:
    key: HandoffKey
    state: LandingState
    since_s: float
    seq: Sequence | None = None
    offered: Offered | None = None
    blocks: list[int] = field(default_factory=list)

    def to(self, state: LandingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"landing {self.key.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class Landings:
    """All hand-offs that this engine receives, by key; waiting offers are granted first come, first served."""

    def __init__(self, kv: KVManager, agent: HandoffCommands) -> None:
        self._kv = kv
        self._agent = agent
        self._open: dict[HandoffKey, _Incoming] = {}

    def __len__(self) -> int:
        return len(self._open)

    def waiting(self) -> int:
        return sum(item.state is LandingState.WAITING for item in self._open.values())

    def state(self, key: HandoffKey) -> LandingState | None:
        item = self._open.get(key)
        return item.state if item else None

    def expect(self, request: Request, now: float) -> None:
        """The ingress says that this request will be decoded here."""
        key = HandoffKey(request.request_id, request.epoch)
        item = self._open.get(key)
        if item is None:
            self._open[key] = _Incoming(key, LandingState.EXPECTED, now, seq=Sequence(request, now))
        elif item.state is LandingState.EARLY:
            item.seq = Sequence(request, now)
            self._match_up(item)

    def offered(self, event: Offered, now: float) -> None:
        """A prefill engine has begun the prompt."""
        key = event.offer.key
        item = self._open.get(key)
        if item is None:
            self._open[key] = _Incoming(key, LandingState.EARLY, now, offered=event)
        elif item.state is LandingState.EXPECTED:
            item.offered = event
            self._match_up(item)

    def grant_waiting(self, reserve_blocks: int) -> None:
        """Give landing blocks to waiting offers, in order, while `reserve_blocks` stay available for running ones."""
        for item in list(self._open.values()):
            if item.state is LandingState.WAITING and not self._grant(item, reserve_blocks):
                return

    def expire(self, now: float) -> None:
        """Refuse offers for which no submit came; the request ended before its offer arrived."""
        for item in list(self._open.values()):
            if item.state is LandingState.EARLY and now - item.since_s > EARLY_GRACE_S:
                self.cancel(item.key, "decode: no ingress submitted this request")

    def landed(self, key: HandoffKey) -> Sequence | None:
        """The prompt's KV is complete here: ack, and hand over the sequence with its blocks. None if cancelled."""
        item = self._open.get(key)
        if item is None or item.state is not LandingState.GRANTED or item.seq is None:
            return None
        del self._open[key]
        seq, size = item.seq, self._kv.block_size
        seq.block_table = item.blocks
        seq.num_computed = len(seq.tokens)
        full = len(seq.tokens) // size
        self._kv.commit(seq.hashes(size, full), seq.block_table[:full])
        self._agent.ack(key)
        return seq

    def cancel(self, key: HandoffKey, reason: str) -> None:
        """End a hand-off in any state; blocks come back at once, or with `Released` where KV may be in flight."""
        item = self._open.get(key)
        if item is None or item.state is LandingState.CLOSING:
            return
        if item.state is LandingState.EXPECTED:
            del self._open[key]  # the agent has not heard of it
            return
        item.to(LandingState.CLOSING)
        self._agent.cancel(key, reason)

    def failed(self, key: HandoffKey) -> bool:
        """The agent gave up; True if that was news."""
        item = self._open.get(key)
        if item is None or item.state in (LandingState.CLOSING, LandingState.EXPECTED):
            return False
        item.to(LandingState.CLOSING)
        return True

    def released(self, key: HandoffKey) -> None:
        """Nothing writes the landing blocks any more."""
        item = self._open.get(key)
        if item is not None and item.state is LandingState.CLOSING:
            del self._open[key]
            self._kv.release(item.blocks)

    def _match_up(self, item: _Incoming) -> None:
        assert item.seq is not None
        assert item.offered is not None
        offer, tokens = item.offered.offer, len(item.seq.tokens)
        blocks = -(-tokens // self._kv.block_size)
        item.to(LandingState.WAITING)
        if (offer.num_tokens, offer.num_blocks) != (tokens, blocks):
            self.cancel(
                item.key,
                f"offer of {offer.num_tokens} tokens in {offer.num_blocks} blocks, expected {tokens} in {blocks}",
            )

    def _grant(self, item: _Incoming, reserve_blocks: int) -> bool:
        assert item.seq is not None
        size, total = self._kv.block_size, -(-len(item.seq.tokens) // self._kv.block_size)
        cached = self._kv.match(item.seq.hashes(size, len(item.seq.tokens) // size))
        try:
            if self._kv.available < total - len(cached) + reserve_blocks:
                raise OutOfBlocks(total - len(cached) + reserve_blocks, self._kv.available)
            fresh = self._kv.allocate(total - len(cached))
        except OutOfBlocks:
            self._kv.release(cached)
            return False
        item.blocks = cached + fresh
        item.to(LandingState.GRANTED)
        self._agent.grant(item.key, Landing(len(cached), tuple(fresh)))
        return True
