"""Hand-offs that an engine receives: when KV may land, where, and who holds the landing blocks.

Two messages start one, in either order: the ingress's SUBMIT (what to decode) and the peer's OFFER (the prompt has
begun to compute). No block is reserved before both are here and the pool has room, so prompts that wait in a prefill
queue cost decode nothing.

    EXPECTED  submit, no offer          EARLY    offer, no submit (dropped after a grace period)
    WAITING   both, no room yet         GRANTED  blocks are held, KV is arriving
    CLOSING   over, waiting until nothing can write the blocks any more

An offer for a request that has ended here is refused at once, for the reason that it ended for.

A migrated sequence comes in two hand-offs of one key, one after the other: first a copy of the blocks that were whole
when the migration began, then the rest with its tokens, expected together with the blocks of the first. Neither waits
for room: its source would rather go on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvbaton.engine.block_hash import BlockHash
from kvbaton.engine.kv.block_owners import BlockOwners, Holding, Owner
from kvbaton.engine.kv.kv_manager import KVManager, OutOfBlocks
from kvbaton.engine.sequence import IllegalTransition
from kvbaton.kvtransfer.messages import HandoffCommands, HandoffKey, Landing, Offer, Offered

EARLY_GRACE_S = 10.0
MIGRATION_GRACE_S = 30.0
MAX_ENDED = 4096


class IncomingState(enum.Enum):
    EXPECTED = "expected"
    EARLY = "early"
    WAITING = "waiting"
    GRANTED = "granted"
    CLOSING = "closing"


_LEGAL = {
    IncomingState.EXPECTED: frozenset({IncomingState.WAITING}),
    IncomingState.EARLY: frozenset({IncomingState.WAITING, IncomingState.CLOSING}),
    IncomingState.WAITING: frozenset({IncomingState.GRANTED, IncomingState.CLOSING}),
    IncomingState.GRANTED: frozenset({IncomingState.CLOSING}),
    IncomingState.CLOSING: frozenset[IncomingState](),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a submit says of a hand-off to come. `hashes` are those of the full blocks, to be looked up in the prefix
    cache. `num_tokens` None: the rest of a migrated sequence, of which only the source knows how long it is by now.
    Only a `patient` one waits for room."""

    num_tokens: int | None
    hashes: Sequence[BlockHash] = ()
    patient: bool = True

    def mismatch(self, offer: Offer, block_size: int, num_here: int) -> str | None:
        """Why `offer` cannot be what is expected, `num_here` blocks being here already."""
        if self.num_tokens is None:
            if offer.num_blocks >= num_here:
                return None
            return f"offer of {offer.num_blocks} blocks, {num_here} are here already"
        tokens, blocks = self.num_tokens, -(-self.num_tokens // block_size)
        if (offer.num_tokens, offer.num_blocks) == (tokens, blocks):
            return None
        return f"offer of {offer.num_tokens} tokens in {offer.num_blocks} blocks, expected {tokens} in {blocks}"


@dataclass(slots=True)
class _Incoming:
    key: HandoffKey
    state: IncomingState
    since_s: float
    expected: Expected | None = None
    offer: Offer | None = None
    blocks: list[int] = field(default_factory=list)
    owner: Owner | None = None

    @property
    def patient(self) -> bool:
        return self.expected is None or self.expected.patient

    def to(self, state: IncomingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"incoming {self.key.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class IncomingHandoffs:
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
        return sum(item.state is IncomingState.WAITING for item in self._open.values())

    def oldest_waiting(self) -> HandoffKey | None:
        """The offer that has waited for room for longest."""
        return next((item.key for item in self._open.values() if item.state is IncomingState.WAITING), None)

    def state(self, key: HandoffKey) -> IncomingState | None:
        item = self._open.get(key)
        return item.state if item else None

    def states(self) -> list[IncomingState]:
        """Of all open ones, the oldest first."""
        return [item.state for item in self._open.values()]

    def held(self) -> Iterator[Holding]:
        """The blocks of each hand-off."""
        return (Holding(item.blocks, item.owner) for item in self._open.values())

    def expect(self, key: HandoffKey, expected: Expected, now: float, blocks: list[int] | None = None) -> None:
        """The ingress says that this will be decoded here. The hold on the first `blocks`, where they are here
        already, passes to the hand-off."""
        item = self._open.get(key)
        self._ended.pop(key, None)
        if item is None:
            item = self._open[key] = _Incoming(key, IncomingState.EXPECTED, now, expected)
        elif item.state is IncomingState.EARLY:
            item.expected = expected
        if blocks:
            item.blocks = blocks
            self._own(item, Owner.LANDING)
        if item.state is IncomingState.EARLY:
            self._match_up(item, expected)

    def offered(self, event: Offered, now: float) -> None:
        """A peer has begun the prompt, or the migration."""
        key = event.offer.key
        item = self._open.get(key)
        if item is None and (reason := self._ended.pop(key, None)) is not None:
            self._agent.cancel(key, reason)
        elif item is None:
            self._open[key] = _Incoming(key, IncomingState.EARLY, now, offer=event.offer)
        elif item.expected is not None and item.state is IncomingState.EXPECTED:
            item.offer = event.offer
            self._match_up(item, item.expected)

    def grant_waiting(self, reserve_blocks: int, closed: bool = False) -> list[HandoffKey]:
        """Give landing blocks to waiting offers, in order, while `reserve_blocks` stay available for running ones, and
        to none while `closed`. Returns those that would not wait and got none: the caller ends their requests."""
        waiting = [item for item in self._open.values() if item.state is IncomingState.WAITING]
        refused = [
            item.key for item in waiting if not item.patient and (closed or not self._grant(item, reserve_blocks))
        ]
        for item in waiting:
            if item.patient and (closed or not self._grant(item, reserve_blocks)):
                break
        return refused

    def expire(self, now: float) -> list[HandoffKey]:
        """Refuse offers for which no submit came: the request ended before its offer arrived. Returns the submits for
        whose sequence nothing came: the caller ends them."""
        late: list[HandoffKey] = []
        for item in list(self._open.values()):
            waited_s = now - item.since_s
            if item.state is IncomingState.EARLY and waited_s > EARLY_GRACE_S:
                self.cancel(item.key, "decode: no ingress submitted this request")
            if item.state is IncomingState.EXPECTED and not item.patient and waited_s > MIGRATION_GRACE_S:
                late.append(item.key)
        return late

    def landed(self, key: HandoffKey, num_tokens: int) -> list[int] | None:
        """The KV of `num_tokens` tokens is complete here: ack, and pass its blocks and the hold on them to the caller.
        None if it was cancelled meanwhile. Raises `ValueError`, with nothing changed, if there are not as many."""
        item = self._open.get(key)
        if item is None or item.state is not IncomingState.GRANTED:
            return None
        size = self._kv.block_size
        if -(-num_tokens // size) != len(item.blocks):
            raise ValueError(f"{num_tokens} tokens came in {len(item.blocks)} blocks of {size}")
        del self._open[key]
        self._own(item, None)
        self._agent.ack(key)
        return item.blocks

    def cancel(self, key: HandoffKey, reason: str) -> None:
        """End a hand-off in any state, also one to come; blocks come back at once, or with `Released` where KV may be
        in flight."""
        item = self._open.get(key)
        if item is None or item.state is IncomingState.EXPECTED:  # the agent has not heard of it
            self._remember(key, reason)
            if item is not None:
                self._drop(item)
        elif item.state is not IncomingState.CLOSING:
            self._close(item)
            self._agent.cancel(key, reason)

    def failed(self, key: HandoffKey) -> bool:
        """The agent gave up; True if that was news."""
        item = self._open.get(key)
        if item is None or item.state in (IncomingState.CLOSING, IncomingState.EXPECTED):
            return False
        self._close(item)
        return True

    def released(self, key: HandoffKey) -> None:
        """Nothing writes the landing blocks any more."""
        item = self._open.get(key)
        if item is not None and item.state is IncomingState.CLOSING:
            self._drop(item)

    def _match_up(self, item: _Incoming, expected: Expected) -> None:
        assert item.offer is not None
        item.to(IncomingState.WAITING)
        mismatch = expected.mismatch(item.offer, self._kv.block_size, len(item.blocks))
        if mismatch is not None:
            self.cancel(item.key, mismatch)

    def _grant(self, item: _Incoming, reserve_blocks: int) -> bool:
        assert item.expected is not None
        assert item.offer is not None
        cached = [] if item.blocks else self._kv.match(item.expected.hashes)
        missing = item.offer.num_blocks - len(item.blocks) - len(cached)
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
        item.to(IncomingState.GRANTED)
        self._agent.grant(item.key, Landing(first, tuple(fresh)))
        return True

    def _close(self, item: _Incoming) -> None:
        item.to(IncomingState.CLOSING)
        self._own(item, Owner.QUARANTINE)

    def _drop(self, item: _Incoming) -> None:
        del self._open[item.key]
        self._own(item, None)
        self._kv.free(item.blocks)

    def _remember(self, key: HandoffKey, reason: str) -> None:
        self._ended[key] = reason
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _own(self, item: _Incoming, owner: Owner | None) -> None:
        self._owners.change(item.owner, owner, item.blocks)
        item.owner = owner
