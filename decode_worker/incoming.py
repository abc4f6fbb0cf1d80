"""Hand-offs as the decode engine sees them: when KV may land, where, and who holds the landing blocks.

Two messages start one, in either order: the ingress's SUBMIT (what to decode) and the prefill engine's OFFER (the
prompt has begun to compute). No block is reserved before both are here and the pool has room, so prompts that wait in a
prefill queue cost decode nothing.

    EXPECTED  submit, no offer          EARLY    offer, no submit (dropped after a grace period)
    WAITING   both, no room yet         GRANTED  blocks are held, KV is arriving
    CLOSING   over, waiting until nothing can write the blocks any more

An offer for a request that has ended here is refused at once, for the reason that it ended for.

A sequence that moves here while it decodes comes in two hand-offs: first a copy of the whole blocks that it had when
the move began, then the rest with its tokens. The second is expected together with the blocks of the first. Neither
waits for room: its source would rather go on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvbaton.engine.kv.block_owners import BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import KVManager, OutOfBlocks
from kvbaton.engine.request import Request
from kvbaton.engine.sequence import IllegalTransition, Sequence
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import HandoffKey, Landing, Offered

EARLY_GRACE_S = 10.0
MIGRATION_GRACE_S = 30.0
MAX_ENDED = 4096


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
    patient: bool = True  # may wait for room
    moving: bool = False  # brings tokens that the submit did not have, the last of them without KV
    owner: Owner | None = None

    def to(self, state: LandingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"landing {self.key.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class Landings:
    """All hand-offs that this engine receives, by key; waiting offers are granted first come, first served."""

    def __init__(self, kv: KVManager, agent: HandoffCommands, owners: BlockOwners) -> None:
        self._kv = kv
        self._agent = agent
        self._owners = owners
        self._open: dict[HandoffKey, _Incoming] = {}
        self._ended: dict[HandoffKey, str] = {}  # requests that ended before their offer came, the oldest first

    def __len__(self) -> int:
        return len(self._open)

    def waiting(self) -> int:
        return sum(item.state is LandingState.WAITING for item in self._open.values())

    def oldest_waiting(self) -> HandoffKey | None:
        """The offer that has waited for room for longest."""
        return next((item.key for item in self._open.values() if item.state is LandingState.WAITING), None)

    def state(self, key: HandoffKey) -> LandingState | None:
        item = self._open.get(key)
        return item.state if item else None

    def held(self) -> Iterator[list[int]]:
        """The blocks of each hand-off, for an audit."""
        return (item.blocks for item in self._open.values() if item.owner is not None)

    def expect(self, request: Request, now: float, patient: bool = True) -> None:
        """The ingress says that this request will be decoded here."""
        item = self._expect(Sequence(request, now), now, patient)
        if item.state is LandingState.EARLY:
            self._match_up(item)

    def expect_migration(self, request: Request, blocks: list[int], now: float) -> None:
        """The rest of a sequence that decodes elsewhere will come; the hold on its first `blocks` passes to here."""
        item = self._expect(Sequence(request, now), now, patient=False)
        item.moving = True
        item.blocks = blocks
        self._own(item, Owner.LANDING)
        if item.state is LandingState.EARLY:
            self._match_up(item)

    def offered(self, event: Offered, now: float) -> None:
        """A prefill engine has begun the prompt."""
        key = event.offer.key
        item = self._open.get(key)
        if item is None and (reason := self._ended.pop(key, None)) is not None:
            self._agent.cancel(key, reason)
        elif item is None:
            self._open[key] = _Incoming(key, LandingState.EARLY, now, offered=event)
        elif item.state is LandingState.EXPECTED:
            item.offered = event
            self._match_up(item)

    def grant_waiting(self, reserve_blocks: int, closed: bool = False) -> list[HandoffKey]:
        """Give landing blocks to waiting offers, in order, while `reserve_blocks` stay available for running ones, and
        to none while `closed`. Returns those that would not wait and got none: the caller ends their requests."""
        waiting = [item for item in self._open.values() if item.state is LandingState.WAITING]
        hasty = [item for item in waiting if not item.patient]
        refused = [item.key for item in hasty if closed or not self._grant(item, reserve_blocks)]
        for item in waiting:
            if item.patient and (closed or not self._grant(item, reserve_blocks)):
                break
        return refused

    def expire(self, now: float) -> list[HandoffKey]:
        """Refuse offers for which no submit came: the request ended before its offer arrived. Returns the submits for
        whose sequence nothing came: the caller ends them."""
        late: list[HandoffKey] = []
        for item in list(self._open.values()):
            if item.state is LandingState.EARLY and now - item.since_s > EARLY_GRACE_S:
                self.cancel(item.key, "decode: no ingress submitted this request")
            if item.state is LandingState.EXPECTED and not item.patient and now - item.since_s > MIGRATION_GRACE_S:
                late.append(item.key)
        return late

    def landed(self, key: HandoffKey, more_tokens: Iterable[int] = ()) -> Sequence | None:
        """The prompt's KV is complete here: ack, and hand over the sequence with its blocks. None if cancelled.
        `more_tokens` are what a moving sequence has got since its submit. Raises `ValueError` if they do not fit."""
        item = self._open.get(key)
        if item is None or item.state is not LandingState.GRANTED or item.seq is None:
            return None
        seq, size = item.seq, self._kv.block_size
        seq.tokens.extend(more_tokens)
        seq.num_computed = len(seq.tokens) - item.moving
        if -(-seq.num_computed // size) != len(item.blocks):
            raise ValueError(f"{seq.num_computed} tokens came in {len(item.blocks)} blocks of {size}")
        del self._open[key]
        self._own(item, None)
        seq.block_table = item.blocks
        full = seq.num_computed // size
        self._kv.commit(seq.hashes(size, full), seq.block_table[:full])
        self._agent.ack(key)
        return seq

    def cancel(self, key: HandoffKey, reason: str) -> None:
        """End a hand-off in any state, also one to come; blocks come back at once, or with `Released` where KV may be
        in flight."""
        item = self._open.get(key)
        if item is None or item.state is LandingState.EXPECTED:  # the agent has not heard of it
            self._remember(key, reason)
            if item is not None:
                del self._open[key]
                self._release(item)
            return
        if item.state is LandingState.CLOSING:
            return
        item.to(LandingState.CLOSING)
        self._own(item, Owner.QUARANTINE)
        self._agent.cancel(key, reason)

    def failed(self, key: HandoffKey) -> bool:
        """The agent gave up; True if that was news."""
        item = self._open.get(key)
        if item is None or item.state in (LandingState.CLOSING, LandingState.EXPECTED):
            return False
        item.to(LandingState.CLOSING)
        self._own(item, Owner.QUARANTINE)
        return True

    def released(self, key: HandoffKey) -> None:
        """Nothing writes the landing blocks any more."""
        item = self._open.get(key)
        if item is not None and item.state is LandingState.CLOSING:
            del self._open[key]
            self._release(item)

    def _expect(self, seq: Sequence, now: float, patient: bool) -> _Incoming:
        key = HandoffKey(seq.request.request_id, seq.request.epoch)
        item = self._open.get(key)
        self._ended.pop(key, None)
        if item is None:
            item = self._open[key] = _Incoming(key, LandingState.EXPECTED, now, seq, patient=patient)
        elif item.state is LandingState.EARLY:
            item.seq, item.patient = seq, patient
        return item

    def _match_up(self, item: _Incoming) -> None:
        assert item.seq is not None
        assert item.offered is not None
        offer, tokens = item.offered.offer, len(item.seq.tokens)
        blocks = -(-tokens // self._kv.block_size)
        item.to(LandingState.WAITING)
        if item.moving:
            if offer.num_blocks < len(item.blocks):
                self.cancel(item.key, f"offer of {offer.num_blocks} blocks, {len(item.blocks)} are here already")
        elif (offer.num_tokens, offer.num_blocks) != (tokens, blocks):
            self.cancel(
                item.key,
                f"offer of {offer.num_tokens} tokens in {offer.num_blocks} blocks, expected {tokens} in {blocks}",
            )

    def _grant(self, item: _Incoming, reserve_blocks: int) -> bool:
        assert item.seq is not None
        assert item.offered is not None
        size, total = self._kv.block_size, item.offered.offer.num_blocks
        cached = [] if item.moving else self._kv.match(item.seq.hashes(size, len(item.seq.tokens) // size))
        missing = total - len(item.blocks) - len(cached)
        try:
            if self._kv.available < missing + reserve_blocks:
                raise OutOfBlocks(missing + reserve_blocks, self._kv.available)
            fresh = self._kv.allocate(missing)
        except OutOfBlocks:
            self._kv.release(cached)
            return False
        first = len(item.blocks) + len(cached)
        self._own(item, None)
        item.blocks += cached + fresh
        self._own(item, Owner.LANDING)
        item.to(LandingState.GRANTED)
        self._agent.grant(item.key, Landing(first, tuple(fresh)))
        return True

    def _remember(self, key: HandoffKey, reason: str) -> None:
        self._ended[key] = reason
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _release(self, item: _Incoming) -> None:
        self._own(item, None)
        self._kv.release(item.blocks)

    def _own(self, item: _Incoming, owner: Owner | None) -> None:
        self._owners.change(item.owner, owner, item.blocks)
        item.owner = owner
