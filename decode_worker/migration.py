"""A decoding sequence leaves for another engine: what its source does. The target's half is in `Arrivals`.

    COPYING       its whole blocks travel as a hand-off of their own; it decodes
    APPROACHING   they are there; the rest is offered, and what has become whole since travels; it decodes
    PAUSED        granted: the last blocks, the newest tokens and DONE are on their way; it is not scheduled
      acked       it is the target's, and everything that it holds here is given back
      anything else, before or after the pause: it goes on here, nothing was freed

The offer names the blocks that the sequence needs by the time of the grant; where it fills them before, it is paused
until then. So it stands still for one trip over the wire and one step of the target. Both hand-offs hold the blocks
themselves, so that an end, an abort or a preemption here never waits for the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.handoff_payload import encode_newest_tokens
from kvbaton.engine.kv.block_owners import Holding
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import Migrate, Migrated
from kvbaton.engine.outgoing import OutgoingHandoffs
from kvbaton.engine.sequence import IllegalTransition, Sequence, Status
from kvbaton.kvtransfer.messages import Failed, Granted, HandoffCommands, HandoffKey, PeerAddress, Released

PAUSE_LIMIT_S = 2.0


def copied_blocks(context_tokens: int, block_size: int) -> int:
    """How many blocks the copy has: those that are whole on the source whatever the ingress has not seen yet."""
    return max(0, context_tokens - 1) // block_size


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
    """One sequence on its way out. The second hand-off has room for `num_blocks`, once it is offered (0: not yet)."""

    leg: Leg
    seq: Sequence
    order: Migrate
    to_peer: PeerAddress
    state: MigrationState = MigrationState.COPYING
    num_blocks: int = 0
    granted: bool = False
    paused_at_s: float = 0.0

    @property
    def key(self) -> HandoffKey:
        return self.order.key

    def to(self, state: MigrationState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"migration of {self.order.request_id}: {self.state.value} -> {state.value}")
        self.state = state


class Migrations:
    """Every sequence that is leaving this engine. Its ingress is told of each migration that the sequence survives."""

    def __init__(self, ledger: Ledger, agent: HandoffCommands, scheduler: DecodeScheduler) -> None:
        self._kv = ledger.kv
        self._outbox = ledger.outbox
        self._scheduler = scheduler
        self.outgoing = OutgoingHandoffs(ledger.kv, agent, ledger.owners)
        self._by_key: dict[HandoffKey, Migration] = {}
        self._by_seq: dict[int, Migration] = {}

    def __len__(self) -> int:
        return len(self._by_seq)

    def __contains__(self, seq: Sequence) -> bool:
        return id(seq) in self._by_seq

    def held(self) -> Iterator[Holding]:
        return self.outgoing.held()

    def state(self, seq: Sequence) -> MigrationState | None:
        migration = self._by_seq.get(id(seq))
        return None if migration is None else migration.state

    def start(self, leg: Leg, seq: Sequence, order: Migrate) -> str | None:
        """Begin; returns why that is impossible, None if it is not."""
        if order.to is None or order.key in self.outgoing or order.key in self._by_key:
            return "a hand-off of that name is open"
        if seq in self:
            return "it is being migrated already"
        if seq.status is not Status.RUNNING:
            return f"the sequence is {seq.status.value}"
        if not len(seq.request.prompt) <= order.context_tokens <= len(seq.tokens):
            return f"{order.context_tokens} tokens are said to be there, the sequence has {len(seq.tokens)}"
        migration = Migration(leg, seq, order, order.to)
        self._by_seq[id(seq)] = self._by_key[order.key] = migration
        count = copied_blocks(order.context_tokens, self._kv.block_size)
        if count:
            self.outgoing.start(order.key, order.to, seq.block_table[:count], count)
            self.outgoing.complete(order.key, b"")
        else:
            migration.to(MigrationState.APPROACHING)
        return None

    def advance(self, now: float) -> None:
        """Before each step: offer what is left, and pause sequences that have filled what they offered."""
        for migration in list(self._by_seq.values()):
            if migration.state is MigrationState.PAUSED and now - migration.paused_at_s > PAUSE_LIMIT_S:
                self.stop(migration.seq, f"paused for {PAUSE_LIMIT_S:g} s")
            elif migration.state is MigrationState.APPROACHING and not migration.num_blocks:
                self._offer_rest(migration)
            if migration.state is MigrationState.APPROACHING and self._filled(migration):
                self._pause(migration, now)

    def granted(self, event: Granted, now: float) -> None:
        """The target has room: from here to its first token nothing is computed. (For the copy it means nothing.)"""
        migration = self._by_key.get(event.key)
        if migration is None or not migration.num_blocks:
            return
        migration.granted = True
        if migration.state is MigrationState.APPROACHING:
            self._pause(migration, now)
        elif migration.state is MigrationState.PAUSED:
            self._complete(migration)

    def failed(self, event: Failed) -> None:
        """The agent gave one of the hand-offs up: the sequence goes on here."""
        migration = self._by_key.get(event.key)
        if self.outgoing.failed(event.key) and migration is not None:
            self._over(migration)
            self._go_on(migration, event.reason)

    def released(self, event: Released) -> Migration | None:
        """One of the hand-offs is over. Returns the migration whose sequence is the target's now: the caller ends it
        here."""
        migration = self._by_key.get(event.key)
        if not self.outgoing.released(event.key) or migration is None or not event.acked:
            return None
        if migration.state is MigrationState.COPYING:
            migration.to(MigrationState.APPROACHING)
        elif migration.state is MigrationState.PAUSED:
            self._over(migration)
            self._tell(migration, None)
            return migration
        return None

    def stop(self, seq: Sequence, reason: str) -> None:
        """Call a migration off, if there is one; its sequence decodes on unless it is not running (preempted)."""
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
        """The sequence ends: so does its migration, silently."""
        migration = self._by_seq.get(id(seq))
        if migration is not None:
            self._cancel(migration, reason)

    def _offer_rest(self, migration: Migration) -> None:
        """All blocks up to the one that is being filled. Where the last one is full the next is not there yet: a step
        later it is."""
        size, seq = self._kv.block_size, migration.seq
        if seq.num_computed % size == 0 and size > 1:
            return
        full = seq.num_computed // size
        migration.num_blocks = -(-seq.num_computed // size)
        self.outgoing.start(migration.key, migration.to_peer, seq.block_table[:full], migration.num_blocks)

    def _filled(self, migration: Migration) -> bool:
        room = migration.num_blocks * self._kv.block_size
        return room > 0 and migration.seq.num_computed >= room

    def _pause(self, migration: Migration, now: float) -> None:
        migration.to(MigrationState.PAUSED)
        migration.paused_at_s = now
        self._scheduler.remove(migration.seq)
        migration.seq.to(Status.MIGRATING)
        if migration.granted:
            self._complete(migration)

    def _complete(self, migration: Migration) -> None:
        key, seq = migration.key, migration.seq
        self.outgoing.extend(key, seq.block_table[self.outgoing.num_blocks(key) : migration.num_blocks])
        self.outgoing.complete(key, encode_newest_tokens(seq.tokens[migration.order.context_tokens :]))

    def _cancel(self, migration: Migration, reason: str) -> None:
        self._over(migration)
        self.outgoing.cancel(migration.key, reason)

    def _over(self, migration: Migration) -> None:
        migration.to(MigrationState.OVER)
        del self._by_seq[id(migration.seq)], self._by_key[migration.key]

    def _go_on(self, migration: Migration, reason: str) -> None:
        if migration.seq.status is Status.MIGRATING:
            self._scheduler.add(migration.seq)
        self._tell(migration, reason)

    def _tell(self, migration: Migration, refusal: str | None) -> None:
        order = migration.order
        self._outbox.notice(migration.leg.session_id, Migrated(order.new_id, order.new_epoch, refusal))
