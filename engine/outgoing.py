"""Hand-offs as the prefill engine sees them: who holds a computed prompt's blocks until decode has them.

    start(seq)         the prompt's first chunk is about to run: OFFER goes out
    chunk_done(seq)    whole blocks may travel while the next chunk computes
    complete(seq)      the prompt is computed: tail block and DONE; the blocks now belong to this hand-off
    Released           nothing can read them any more: they go back to the pool (whose cache may keep them)

A hand-off that is cancelled or failed keeps its blocks until `Released`, because the transport may still be reading.

A sequence that decodes is handed over by a *carrier*: a sequence of its own for the hand-off, with its own hold on each
block, so that the one that decodes may go on, end or give way at any time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from kvbaton.engine.kv.block_owners import BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.sequence import IllegalTransition, Sequence
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import Cause, GivenUp, HandoffKey, Offer, PeerAddress


class OutgoingState(enum.Enum):
    COMPUTING = "computing"  # blocks belong to the prefill scheduler's sequence
    SENT = "sent"  # everything announced, waiting for the ack
    CLOSING = "closing"  # over, waiting until no operation reads the blocks


_LEGAL = {
    OutgoingState.COMPUTING: frozenset({OutgoingState.SENT, OutgoingState.CLOSING}),
    OutgoingState.SENT: frozenset({OutgoingState.CLOSING}),
    OutgoingState.CLOSING: frozenset[OutgoingState](),
}


@dataclass(slots=True)
class _Outgoing:
    seq: Sequence
    state: OutgoingState
    announced: int = 0  # blocks told to the agent
    owner: Owner | None = None  # why this hand-off holds the blocks; None while the sequence does

    def to(self, state: OutgoingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"outgoing {self.seq.request.request_id}: {self.state.value} -> {state.value}")
        self.state = state


def handoff_key(seq: Sequence) -> HandoffKey:
    return HandoffKey(seq.request.request_id, seq.request.epoch)


class OutgoingHandoffs:
    """All hand-offs that this engine sends, by key."""

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

    def num_blocks(self) -> int:
        """Blocks of all open hand-offs, shared ones counted by each."""
        return sum(len(item.seq.block_table) for item in self._open.values())

    def held(self) -> Iterator[list[int]]:
        """The blocks of each hand-off that holds its own, for an audit."""
        return (item.seq.block_table for item in self._open.values() if item.owner is not None)

    def start(self, seq: Sequence, peer: PeerAddress) -> None:
        """Offer a prompt whose block table is allocated."""
        key = handoff_key(seq)
        self._open[key] = _Outgoing(seq, OutgoingState.COMPUTING)
        self._agent.offer(Offer(key, len(seq.tokens), len(seq.block_table)), peer)
        self.chunk_done(seq, seq.num_computed // self._kv.block_size)  # cached blocks can travel at once

    def start_carrier(self, carrier: Sequence, peer: PeerAddress, num_blocks: int) -> None:
        """Offer `num_blocks` blocks, of which the carrier holds the first; `extend` brings the others."""
        key = handoff_key(carrier)
        item = _Outgoing(carrier, OutgoingState.COMPUTING)
        self._open[key] = item
        self._own(item, Owner.HOLD)
        self._agent.offer(Offer(key, num_blocks * self._kv.block_size, num_blocks), peer)
        self.chunk_done(carrier, len(carrier.block_table))

    def extend(self, carrier: Sequence, block_ids: list[int]) -> None:
        """Give a carrier more of the blocks that were offered; it takes a hold on each over from the caller."""
        item = self._open[handoff_key(carrier)]
        self._owners.change(None, item.owner, block_ids)
        carrier.block_table.extend(block_ids)

    def chunk_done(self, seq: Sequence, full_blocks: int) -> None:
        """The first `full_blocks` blocks are final."""
        item = self._open[handoff_key(seq)]
        ready = seq.block_table[item.announced : full_blocks]
        if ready and item.state is OutgoingState.COMPUTING:
            self._agent.blocks_ready(handoff_key(seq), ready)
            item.announced = full_blocks

    def complete(self, seq: Sequence, payload: bytes) -> None:
        """Send the partial tail block and DONE. From here on the hand-off, not the sequence, holds the blocks."""
        item = self._open[handoff_key(seq)]
        self.chunk_done(seq, len(seq.block_table))
        item.to(OutgoingState.SENT)
        self._own(item, Owner.HOLD)
        self._agent.finish(handoff_key(seq), payload)

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        """End a hand-off early; its blocks come back with `Released`."""
        item = self._open.get(key)
        if item is not None and item.state is not OutgoingState.CLOSING:
            item.to(OutgoingState.CLOSING)
            self._own(item, Owner.QUARANTINE)
            self._agent.cancel(key, reason, cause)

    def failed(self, key: HandoffKey) -> Sequence | None:
        """The agent gave up. Returns the sequence if it was news (the caller stops computing it), else None."""
        item = self._open.get(key)
        if item is None or item.state is OutgoingState.CLOSING:
            return None
        item.to(OutgoingState.CLOSING)
        self._own(item, Owner.QUARANTINE)
        return item.seq

    def released(self, key: HandoffKey) -> Sequence | None:
        """No operation reads the blocks any more: give them back. Returns the sequence whose hand-off ended."""
        item = self._open.pop(key, None)
        if item is None:
            return None
        self._own(item, None)
        self._kv.release(item.seq.block_table)
        item.seq.block_table = []
        return item.seq

    def _own(self, item: _Outgoing, owner: Owner | None) -> None:
        self._owners.change(item.owner, owner, item.seq.block_table)
        item.owner = owner
