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

from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Leg
from kvbaton.engine.moved_tokens import encode_newest_tokens
from kvbaton.engine.orders import Migrate
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
    """What the target of a migration expects first: the first `num_tokens` of the context."""
    return replace(
        request, request_id=request.request_id + COPY_SUFFIX, prompt=request.context[:num_tokens], emitted=()
    )


class MigrationState(enum.Enum):
    COPYING = "copying"
    APPROACHING = "approaching"
    PAUSED = "paused"
    OVER = "over"


_LEGAL = {
    MigrationState.COPYING: frozenset({MigrationState.APPROACHING, MigrationState.OVER}),
    MigrationState.APPROACHING: frozenset({MigrationState.PAUSED, MigrationState.OVER}),
    MigrationState.PAUSED: frozenset({MigrationState.OVER}),
    MigrationState.OVER: frozenset[MigrationState](),
}


@dataclass(slots=True, eq=False)
class Migration:
    """`rest` carries the second hand-off, which has room for `num_blocks`, once it is offered."""

    leg: Leg
    seq: Sequence
    order: Migrate
    state: MigrationState = MigrationState.COPYING
    rest: Sequence | None = None
    num_blocks: int = 0
    granted: bool = False
    paused_at_s: float = 0.0

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.order.new_id, self.order.new_epoch)

    def to(self, state: MigrationState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"migration of {self.order.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class Migrations:
    """Every sequence that is leaving this engine. `ended` is told of each migration that its sequence survived."""

    def __init__(
        self,
        kv: KVManager,
        decode: DecodeScheduler,
        outgoing: OutgoingHandoffs,
        ended: Callable[[Migration, bool, str], None],
    ) -> None:
        self._kv = kv
        self._decode = decode
        self._outgoing = outgoing
        self._ended = ended
        self._by_key: dict[HandoffKey, Migration] = {}  # by the keys of both hand-offs
        self._by_seq: dict[int, Migration] = {}

    def __len__(self) -> int:
        return len(self._by_seq)

    def __contains__(self, seq: Sequence) -> bool:
        return id(seq) in self._by_seq

    def state(self, seq: Sequence) -> MigrationState | None:
        migration = self._by_seq.get(id(seq))
        return None if migration is None else migration.state

    def start(self, leg: Leg, seq: Sequence, order: Migrate) -> str:
        """Begin; returns why that is impossible, or an empty string."""
        key = HandoffKey(order.new_id, order.new_epoch)
        if seq.status is not Status.RUNNING or seq in self:
            return f"the sequence is {seq.status.value}" if seq not in self else "it is being migrated already"
        if order.to is None or key in self._outgoing or copy_key(key) in self._outgoing:
            return "a hand-off of that name is open"
        count = copied_blocks(order.context_tokens, self._kv.block_size)
        if not len(seq.request.prompt) <= order.context_tokens <= len(seq.tokens):
            return f"{order.context_tokens} tokens are said to be there, the sequence has {len(seq.tokens)}"
        migration = Migration(leg, seq, order)
        self._by_seq[id(seq)] = self._by_key[key] = self._by_key[copy_key(key)] = migration
        if count:
            carrier = self._carrier(migration, copy_key(key), seq.block_table[:count])
            self._outgoing.start_carrier(carrier, order.to, count)
            self._outgoing.complete(carrier, b"")
        else:
            migration.to(MigrationState.APPROACHING)
        return ""

    def advance(self, now: float) -> None:
        """Before each step: offer what is left, and stop sequences that have filled what they offered."""
        for migration in list(self._by_seq.values()):
            if migration.state is MigrationState.PAUSED and now - migration.paused_at_s > PAUSE_LIMIT_S:
                self.stop(migration.seq, f"paused for {PAUSE_LIMIT_S:g} s")
            elif migration.state is MigrationState.APPROACHING and migration.rest is None:
                self._offer_rest(migration)
            if migration.state is MigrationState.APPROACHING and self._filled(migration):
                self._pause(migration, now)

    def granted(self, key: HandoffKey, now: float) -> None:
        """The target has room: from here to its first token nothing is computed."""
        migration = self._by_key.get(key)
        if migration is None or key != migration.key or migration.rest is None:
            return
        migration.granted = True
        if migration.state is MigrationState.APPROACHING:
            self._pause(migration, now)
        elif migration.state is MigrationState.PAUSED:
            self._complete(migration)

    def failed(self, key: HandoffKey, reason: str) -> None:
        """The agent gave one of the hand-offs up."""
        migration = self._by_key.get(key)
        if migration is not None:
            self._over(migration)
            self._go_on(migration, reason)

    def released(self, key: HandoffKey, acked: bool) -> None:
        """One of the hand-offs is over, and the outgoing side has given its blocks back."""
        migration = self._by_key.get(key)
        if migration is None or not acked:
            return
        if key != migration.key:
            if migration.state is MigrationState.COPYING:
                migration.to(MigrationState.APPROACHING)
        elif migration.state is MigrationState.PAUSED:
            self._over(migration)
            self._ended(migration, True, "")

    def stop(self, seq: Sequence, reason: str) -> None:
        """Call a migration off; its sequence decodes on unless it is not running (preempted)."""
        migration = self._by_seq.get(id(seq))
        if migration is not None:
            self._cancel(migration, reason)
            self._go_on(migration, reason)

    def stop_named(self, key: HandoffKey, reason: str) -> None:
        """`stop` by the name of the target's leg."""
        migration = self._by_key.get(key)
        if migration is not None:
            self.stop(migration.seq, reason)

    def forget(self, seq: Sequence, reason: str) -> None:
        """The sequence ends: so does its migration, silently. The caller gives the sequence's blocks back."""
        migration = self._by_seq.get(id(seq))
        if migration is not None:
            self._cancel(migration, reason)

    def _offer_rest(self, migration: Migration) -> None:
        """All blocks up to the one that is being filled. Where the last one is full the next is not there yet: a step
        later it is."""
        size, seq = self._kv.block_size, migration.seq
        if migration.order.to is None or (seq.num_computed % size == 0 and size > 1):
            return
        full = seq.num_computed // size
        migration.num_blocks = -(-seq.num_computed // size)
        migration.rest = self._carrier(migration, migration.key, seq.block_table[:full])
        self._outgoing.start_carrier(migration.rest, migration.order.to, migration.num_blocks)

    def _filled(self, migration: Migration) -> bool:
        return migration.rest is not None and migration.seq.num_computed >= migration.num_blocks * self._kv.block_size

    def _pause(self, migration: Migration, now: float) -> None:
        migration.to(MigrationState.PAUSED)
        migration.paused_at_s = now
        self._decode.remove(migration.seq)
        migration.seq.to(Status.MIGRATING)
        if migration.granted:
            self._complete(migration)

    def _complete(self, migration: Migration) -> None:
        assert migration.rest is not None
        tail = migration.seq.block_table[len(migration.rest.block_table) : migration.num_blocks]
        self._kv.fork(tail)
        self._outgoing.extend(migration.rest, tail)
        self._outgoing.complete(
            migration.rest, encode_newest_tokens(migration.seq.tokens[migration.order.context_tokens :])
        )

    def _carrier(self, migration: Migration, key: HandoffKey, block_ids: list[int]) -> Sequence:
        self._kv.fork(block_ids)
        carrier = Sequence(replace(migration.seq.request, request_id=key.request_id, epoch=key.epoch), 0.0)
        carrier.block_table = list(block_ids)
        assert handoff_key(carrier) == key
        return carrier

    def _cancel(self, migration: Migration, reason: str) -> None:
        self._over(migration)
        self._outgoing.cancel(copy_key(migration.key), reason)
        self._outgoing.cancel(migration.key, reason)

    def _over(self, migration: Migration) -> None:
        migration.to(MigrationState.OVER)
        del self._by_seq[id(migration.seq)]
        del self._by_key[migration.key], self._by_key[copy_key(migration.key)]

    def _go_on(self, migration: Migration, reason: str) -> None:
        if migration.seq.status is Status.MIGRATING:
            self._decode.add(migration.seq)
        self._ended(migration, False, reason)
