"""A decoding sequence leaves for another engine: what its source does. The target's half is in `Arrivals`.

    COPYING       its whole blocks travel as a hand-off of their own; it decodes
    APPROACHING   they are there; the rest is offered, and what has become whole since travels; it decodes
    PAUSED        granted: the last blocks, the newest tokens and DONE are on their way; it is not scheduled
      acked       it is the target's, and everything that it holds here is given back
      anything else, before or after the pause: it goes on here, nothing was freed

The offer names the blocks that the sequence needs by the time of the grant; where it fills them before, it is paused
until then. So it stands still for one way of the wire and one step of the target. Both hand-offs carry the blocks under
holds of their own, so that an end, an abort or a preemption here never waits for the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvbaton.cluster.session.types import Move
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Track
from kvbaton.engine.moved_tokens import encode_moved_tokens
from kvbaton.engine.outgoing import OutgoingHandoffs, handoff_key
from kvbaton.engine.request import Request
from kvbaton.engine.sequence import IllegalTransition, Sequence, Status
from kvbaton.kvtransfer.messages import HandoffKey

COPY_SUFFIX = "^"
PAUSE_LIMIT_S = 2.0


def copied_blocks(context_tokens: int, block_size: int) -> int:
    """How many blocks the copy has: those that are whole on the source whatever the ingress has not seen yet."""
    return max(0, context_tokens - 1) // block_size


def copy_key(key: HandoffKey) -> HandoffKey:
    """The name of the copy that precedes the hand-off `key`."""
    return HandoffKey(key.request_id + COPY_SUFFIX, key.epoch)


def copy_request(request: Request, num_tokens: int) -> Request:
    """What the target of a move expects first: the first `num_tokens` of the context."""
    return replace(
        request, request_id=request.request_id + COPY_SUFFIX, prompt=request.context[:num_tokens], emitted=()
    )


class MoveState(enum.Enum):
    COPYING = "copying"
    APPROACHING = "approaching"
    PAUSED = "paused"
    OVER = "over"


_LEGAL = {
    MoveState.COPYING: frozenset({MoveState.APPROACHING, MoveState.OVER}),
    MoveState.APPROACHING: frozenset({MoveState.PAUSED, MoveState.OVER}),
    MoveState.PAUSED: frozenset({MoveState.OVER}),
    MoveState.OVER: frozenset[MoveState](),
}


@dataclass(slots=True, eq=False)
class OutgoingMove:
    """`rest` carries the second hand-off, which has room for `num_blocks`, once it is offered."""

    track: Track
    seq: Sequence
    order: Move
    state: MoveState = MoveState.COPYING
    rest: Sequence | None = None
    num_blocks: int = 0
    granted: bool = False
    paused_at_s: float = 0.0

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.order.new_id, self.order.new_epoch)

    def to(self, state: MoveState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"move of {self.order.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class Moves:
    """Every sequence that is leaving this engine. `ended` is told of each move that its sequence survived."""

    def __init__(
        self,
        kv: KVManager,
        decode: DecodeScheduler,
        outgoing: OutgoingHandoffs,
        ended: Callable[[OutgoingMove, bool, str], None],
    ) -> None:
        self._kv = kv
        self._decode = decode
        self._outgoing = outgoing
        self._ended = ended
        self._by_key: dict[HandoffKey, OutgoingMove] = {}  # by the keys of both hand-offs
        self._by_seq: dict[int, OutgoingMove] = {}

    def __len__(self) -> int:
        return len(self._by_seq)

    def __contains__(self, seq: Sequence) -> bool:
        return id(seq) in self._by_seq

    def state(self, seq: Sequence) -> MoveState | None:
        move = self._by_seq.get(id(seq))
        return None if move is None else move.state

    def start(self, track: Track, seq: Sequence, order: Move) -> str:
        """Begin; returns why that is impossible, or an empty string."""
        key = HandoffKey(order.new_id, order.new_epoch)
        if seq.status is not Status.RUNNING or seq in self:
            return f"the sequence is {seq.status.value}" if seq not in self else "it is being moved already"
        if order.to is None or key in self._outgoing or copy_key(key) in self._outgoing:
            return "a hand-off of that name is open"
        count = copied_blocks(order.context_tokens, self._kv.block_size)
        if not len(seq.request.prompt) <= order.context_tokens <= len(seq.tokens):
            return f"{order.context_tokens} tokens are said to be there, the sequence has {len(seq.tokens)}"
        move = OutgoingMove(track, seq, order)
        self._by_seq[id(seq)] = self._by_key[key] = self._by_key[copy_key(key)] = move
        if count:
            carrier = self._carrier(move, copy_key(key), seq.block_table[:count])
            self._outgoing.start_carrier(carrier, order.to, count)
            self._outgoing.complete(carrier, b"")
        else:
            move.to(MoveState.APPROACHING)
        return ""

    def advance(self, now: float) -> None:
        """Before each step: offer what is left, and stop sequences that have filled what they offered."""
        for move in list(self._by_seq.values()):
            if move.state is MoveState.PAUSED and now - move.paused_at_s > PAUSE_LIMIT_S:
                self.stop(move.seq, f"paused for {PAUSE_LIMIT_S:g} s")
            elif move.state is MoveState.APPROACHING and move.rest is None:
                self._offer_rest(move)
            if move.state is MoveState.APPROACHING and self._filled(move):
                self._pause(move, now)

    def granted(self, key: HandoffKey, now: float) -> None:
        """The target has room: from here to its first token nothing is computed."""
        move = self._by_key.get(key)
        if move is None or key != move.key or move.rest is None:
            return
        move.granted = True
        if move.state is MoveState.APPROACHING:
            self._pause(move, now)
        elif move.state is MoveState.PAUSED:
            self._complete(move)

    def failed(self, key: HandoffKey, reason: str) -> None:
        """The agent gave one of the hand-offs up."""
        move = self._by_key.get(key)
        if move is not None:
            self._over(move)
            self._go_on(move, reason)

    def released(self, key: HandoffKey, acked: bool) -> None:
        """One of the hand-offs is over, and the outgoing side has given its blocks back."""
        move = self._by_key.get(key)
        if move is None or not acked:
            return
        if key != move.key:
            if move.state is MoveState.COPYING:
                move.to(MoveState.APPROACHING)
        elif move.state is MoveState.PAUSED:
            self._over(move)
            self._ended(move, True, "")

    def stop(self, seq: Sequence, reason: str) -> None:
        """Call a move off; its sequence decodes on unless it is not running (preempted)."""
        move = self._by_seq.get(id(seq))
        if move is not None:
            self._cancel(move, reason)
            self._go_on(move, reason)

    def stop_named(self, key: HandoffKey, reason: str) -> None:
        """`stop` by the name of the target's leg."""
        move = self._by_key.get(key)
        if move is not None:
            self.stop(move.seq, reason)

    def forget(self, seq: Sequence, reason: str) -> None:
        """The sequence ends: so does its move, silently. The caller gives the sequence's blocks back."""
        move = self._by_seq.get(id(seq))
        if move is not None:
            self._cancel(move, reason)

    def _offer_rest(self, move: OutgoingMove) -> None:
        """All blocks up to the one that is being filled. Where the last one is full the next is not there yet: a step
        later it is."""
        size, seq = self._kv.block_size, move.seq
        if move.order.to is None or (seq.num_computed % size == 0 and size > 1):
            return
        full = seq.num_computed // size
        move.num_blocks = -(-seq.num_computed // size)
        move.rest = self._carrier(move, move.key, seq.block_table[:full])
        self._outgoing.start_carrier(move.rest, move.order.to, move.num_blocks)

    def _filled(self, move: OutgoingMove) -> bool:
        return move.rest is not None and move.seq.num_computed >= move.num_blocks * self._kv.block_size

    def _pause(self, move: OutgoingMove, now: float) -> None:
        move.to(MoveState.PAUSED)
        move.paused_at_s = now
        self._decode.remove(move.seq)
        move.seq.to(Status.MIGRATING)
        if move.granted:
            self._complete(move)

    def _complete(self, move: OutgoingMove) -> None:
        assert move.rest is not None
        tail = move.seq.block_table[len(move.rest.block_table) : move.num_blocks]
        self._kv.fork(tail)
        self._outgoing.extend(move.rest, tail)
        self._outgoing.complete(move.rest, encode_moved_tokens(move.seq.tokens[move.order.context_tokens :]))

    def _carrier(self, move: OutgoingMove, key: HandoffKey, block_ids: list[int]) -> Sequence:
        self._kv.fork(block_ids)
        carrier = Sequence(replace(move.seq.request, request_id=key.request_id, epoch=key.epoch), 0.0)
        carrier.block_table = list(block_ids)
        assert handoff_key(carrier) == key
        return carrier

    def _cancel(self, move: OutgoingMove, reason: str) -> None:
        self._over(move)
        self._outgoing.cancel(copy_key(move.key), reason)
        self._outgoing.cancel(move.key, reason)

    def _over(self, move: OutgoingMove) -> None:
        move.to(MoveState.OVER)
        del self._by_seq[id(move.seq)]
        del self._by_key[move.key], self._by_key[copy_key(move.key)]

    def _go_on(self, move: OutgoingMove, reason: str) -> None:
        if move.seq.status is Status.MIGRATING:
            self._decode.add(move.seq)
        self._ended(move, False, reason)
