"""Hand-offs as the prefill engine sees them: who holds a computed prompt's blocks until decode has them.

    start(seq)         the prompt's first chunk is about to run: OFFER goes out
    chunk_done(seq)    whole blocks may travel while the next chunk computes
    complete(seq)      the prompt is computed: tail block and DONE; the blocks now belong to this hand-off
    Released           nothing can read them any more: they go back to the pool (whose cache may keep them)

A hand-off that is cancelled or failed keeps its blocks until `Released`, because the transport may still be reading.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvbaton.engine.kv_manager import KVManager
from kvbaton.engine.sequence import IllegalTransition, Sequence
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import HandoffKey, Offer, PeerAddress


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
    announced: int  # blocks told to the agent

    def to(self, state: OutgoingState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"outgoing {self.seq.request.request_id}: {self.state.value} -> {state.value}")
        self.state = state


def handoff_key(seq: Sequence) -> HandoffKey:
    return HandoffKey(seq.request.request_id, seq.request.epoch)


class OutgoingHandoffs:
    """All hand-offs that this engine sends, by key."""

    def __init__(self, kv: KVManager, agent: HandoffCommands) -> None:
        self._kv = kv
        self._agent = agent
        self._open: dict[HandoffKey, _Outgoing] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._open

    def state(self, key: HandoffKey) -> OutgoingState | None:
        item = self._open.get(key)
        return item.state if item else None

    def start(self, seq: Sequence, peer: PeerAddress) -> None:
        """Offer a prompt whose block table is allocated."""
        key = handoff_key(seq)
        self._open[key] = _Outgoing(seq, OutgoingState.COMPUTING, 0)
        self._agent.offer(Offer(key, len(seq.tokens), len(seq.block_table)), peer)
        self.chunk_done(seq, seq.num_computed // self._kv.block_size)  # cached blocks can travel at once

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
        self._agent.finish(handoff_key(seq), payload)

    def cancel(self, key: HandoffKey, reason: str) -> None:
        """End a hand-off early; its blocks come back with `Released`."""
        item = self._open.get(key)
        if item is not None and item.state is not OutgoingState.CLOSING:
            item.to(OutgoingState.CLOSING)
            self._agent.cancel(key, reason)

    def failed(self, key: HandoffKey) -> Sequence | None:
        """The agent gave up. Returns the sequence if it was news (the caller stops computing it), else None."""
        item = self._open.get(key)
        if item is None or item.state is OutgoingState.CLOSING:
            return None
        item.to(OutgoingState.CLOSING)
        return item.seq

    def released(self, key: HandoffKey) -> Sequence | None:
        """No operation reads the blocks any more: give them back. Returns the sequence whose hand-off ended."""
        item = self._open.pop(key, None)
        if item is None:
            return None
        self._kv.release(item.seq.block_table)
        item.seq.block_table = []
        return item.seq
