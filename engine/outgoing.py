"""Hand-offs that an engine sends: who holds the blocks that a peer reads, until it has them.

    start       OFFER goes out; the blocks are held here too, beside the sequence that fills or still uses them
    extend      more of the offered blocks, for one that did not have them all at the start
    announce    the first so-many are final, and may travel
    complete    nothing follows: the last blocks and DONE
    Released    no operation reads the blocks any more: the hold is dropped (the prefix cache may keep them)

A hand-off that is cancelled or failed keeps its hold until `Released`. As it has a hold of its own on each block, the
sequence may end, give way or go on at any time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvbaton.engine.kv.block_owners import BlockOwners, Holding, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.sequence import IllegalTransition
from kvbaton.kvtransfer.messages import Cause, GivenUp, HandoffCommands, HandoffKey, Offer, PeerAddress


class OutgoingState(enum.Enum):
    OPEN = "open"  # a sequence still computes some of the blocks
    SENT = "sent"  # everything announced, waiting for the ack
    CLOSING = "closing"  # over, waiting until no operation reads the blocks


_LEGAL = {
    OutgoingState.OPEN: frozenset({OutgoingState.SENT, OutgoingState.CLOSING}),
    OutgoingState.SENT: frozenset({OutgoingState.CLOSING}),
    OutgoingState.CLOSING: frozenset[OutgoingState](),
}


@dataclass(slots=True)
class _Outgoing:
    key: HandoffKey
    owner: Owner | None  # what its hold counts as; None while it counts as the sequence's
    state: OutgoingState = OutgoingState.OPEN
    blocks: list[int] = field(default_factory=list)
    announced: int = 0  # blocks told to the agent

    def to(self, state: OutgoingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"outgoing {self.key.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class OutgoingHandoffs:
    """The hand-offs that one kind of leg sends, by key."""

    def __init__(self, kv: KVManager, agent: HandoffCommands, owners: BlockOwners) -> None:
        self._kv = kv
        self._agent = agent
        self._owners = owners
        self._open: dict[HandoffKey, _Outgoing] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._open

    def state(self, key: HandoffKey) -> OutgoingState | None:
        item = self._open.get(key)
        return item.state if item else None

    def states(self) -> list[OutgoingState]:
        """Of all open ones, the oldest first."""
        return [item.state for item in self._open.values()]

    def num_blocks(self, key: HandoffKey | None = None) -> int:
        """Blocks that one hand-off holds; of all open ones for None, shared blocks counted by each."""
        items = self._open.values() if key is None else [self._open[key]]
        return sum(len(item.blocks) for item in items)

    def held(self) -> Iterator[Holding]:
        """What each hand-off holds."""
        return (Holding(item.blocks, item.owner) for item in self._open.values())

    def start_prompt(self, key: HandoffKey, peer: PeerAddress, blocks: Sequence[int], num_tokens: int) -> None:
        """Offer a prompt of `num_tokens` tokens that is about to be computed in `blocks`. Until it is complete they
        count as its sequence's."""
        self._start(_Outgoing(key, owner=None), peer, blocks, Offer(key, num_tokens, len(blocks)))

    def start(self, key: HandoffKey, peer: PeerAddress, blocks: Sequence[int], num_blocks: int) -> None:
        """Offer `num_blocks` blocks of a sequence that decodes, whose first, `blocks`, are final."""
        size = self._kv.block_size
        self._start(_Outgoing(key, Owner.HOLD), peer, blocks, Offer(key, num_blocks * size, num_blocks))
        self.announce(key, len(blocks))

    def extend(self, key: HandoffKey, blocks: Sequence[int]) -> None:
        """Hold more of the blocks that were offered."""
        self._hold(self._open[key], blocks)

    def announce(self, key: HandoffKey, num_final: int) -> None:
        """The first `num_final` blocks are final. Nothing happens where the hand-off is over."""
        item = self._open[key]
        ready = item.blocks[item.announced : num_final]
        if ready and item.state is OutgoingState.OPEN:
            self._agent.blocks_ready(key, ready)
            item.announced = num_final

    def complete(self, key: HandoffKey, payload: bytes) -> None:
        """All blocks are final: send the last ones and DONE with `payload`."""
        item = self._open[key]
        self.announce(key, len(item.blocks))
        item.to(OutgoingState.SENT)
        self._own(item, Owner.HOLD)
        self._agent.finish(key, payload)

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        """End a hand-off early, if it is open; its hold ends with `Released`."""
        if self._close(key):
            self._agent.cancel(key, reason, cause)

    def failed(self, key: HandoffKey) -> bool:
        """The agent gave up; True if that is news here."""
        return self._close(key)

    def released(self, key: HandoffKey) -> bool:
        """No operation reads the blocks any more: drop the hold. False for a key that is not open here."""
        item = self._open.pop(key, None)
        if item is None:
            return False
        self._own(item, None)
        self._kv.free(item.blocks)
        return True

    def _start(self, item: _Outgoing, peer: PeerAddress, blocks: Sequence[int], offer: Offer) -> None:
        self._open[item.key] = item
        self._hold(item, blocks)
        self._agent.offer(offer, peer)

    def _hold(self, item: _Outgoing, blocks: Sequence[int]) -> None:
        self._kv.fork(blocks)
        self._owners.change(None, item.owner, blocks)
        item.blocks.extend(blocks)

    def _close(self, key: HandoffKey) -> bool:
        item = self._open.get(key)
        if item is None or item.state is OutgoingState.CLOSING:
            return False
        item.to(OutgoingState.CLOSING)
        self._own(item, Owner.QUARANTINE)
        return True

    def _own(self, item: _Outgoing, owner: Owner | None) -> None:
        self._owners.change(item.owner, owner, item.blocks)
        item.owner = owner
