"""Samples that migrate from one decode engine to another while they stream: the ingress's half.

    start ──> a MIGRATION leg at the target, an order at the source ──> the target's tokens begin where the source's end
      the source says migrated, or the target sends the token that is next     the sample is the target's
      the source says that it goes on                                       the target's leg is aborted
      the target is lost                                                    the source goes on if it can, and says so
      the source is lost, or the sample ends                                both legs end; a lost one is resumed

The target's tokens may overtake the source's last ones, which come over another connection: they wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from kvbaton.cluster.client.live_request import Attempt, ClientMigration, Flight, resume_request
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.engine.orders import LegKind, Migrate, Migrated, Submit
from kvbaton.engine.request import FinishReason, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.router import Router

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_MAX_TRIES = 4


class MigrationRefused(RuntimeError):
    """A sample that cannot be migrated now, and why."""


class MigrationHost(Protocol):
    """What migrations need of the client."""

    config: ClientConfig
    router: Router
    counters: ClientCounters

    @property
    def attempts(self) -> Iterable[Attempt]: ...

    def session(self, info: EngineInfo) -> SessionClient:
        """Raises `SessionLost`."""
        ...

    def register(self, attempt: Attempt) -> None: ...

    def forget(self, attempt: Attempt) -> None: ...

    def accept(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """Take an output of the engine that a sample is at."""
        ...

    def resume_elsewhere(self, attempt: Attempt, sample: int, reason: str, counted: bool) -> None:
        """Compute a sample anew at another engine; `counted` as one of its resumes."""
        ...


class ClientMigrations:
    """Every migration of this ingress. Lives on the client's event loop."""

    def __init__(self, host: MigrationHost) -> None:
        self._host = host
        self._open: dict[str, ClientMigration] = {}  # by the request id of the target's leg

    def __len__(self) -> int:
        return len(self._open)

    def start(self, flight: Flight, index: int, to: EngineInfo) -> ClientMigration:
        """Begin. Raises `MigrationRefused`, `SessionLost`; its `done` tells why it failed, or None."""
        sample = flight.samples[index]
        source = sample.attempt
        if source is None or sample.done or sample.migration is not None:
            raise MigrationRefused("the sample is not at one engine")
        if not source.decodes(index):
            raise MigrationRefused("its prompt is still being computed")
        if source.second.info.engine_id == to.engine_id:
            raise MigrationRefused(f"it is at {to.engine_id} already")
        session = self._host.session(to)
        flight.epoch += 1
        request = resume_request(flight, index)
        booking = self._host.router.book_migration(request, to)
        target = Attempt(flight, request, session, session, booking, {index}, standby=True)
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        migration = ClientMigration(index, source, target, done)
        self._host.register(target)
        self._open[request.request_id] = sample.migration = migration
        session.submit(Submit(request, LegKind.MIGRATION, _address(source.second.info)))
        source.second.migrate(_order(migration, _address(to)))
        return migration

    def output(self, target: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """A word of a target whose sample is not its own yet."""
        migration = self._open.get(target.request.request_id)
        if migration is None:
            return
        if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._target_lost(migration, output.error or str(output.finish))
            return
        expected = len(target.flight.samples[migration.sample].tokens)
        if output.index == expected:
            self._switch(migration, tell_source=True)
            self._host.accept(target, session, output)
        elif output.index > expected and (not migration.ahead or output.index == migration.ahead[-1].index + 1):
            migration.ahead.append(output)

    def told(self, session: SessionClient, migrated: Migrated) -> None:
        """A source's last word about a migration."""
        migration = self._open.get(migrated.new_id)
        if (
            migration is None
            or migration.source.second is not session
            or migration.target.request.epoch != migrated.new_epoch
        ):
            return
        if migrated.refusal is not None:
            self._end(migration, migration.target_lost or migrated.refusal)
        elif migration.target_lost is not None:
            reason = f"migrated to {migration.target.second.info.engine_id}, which was lost"
            self._end(migration, reason)
            self._host.resume_elsewhere(migration.source, migration.sample, reason, counted=True)
        else:
            ahead = migration.ahead
            self._switch(migration, tell_source=False)
            for output in ahead:
                self._host.accept(migration.target, migration.target.second, output)
            migration.target.flight.wake()

    def lost(self, session: SessionClient) -> None:
        """A connection is gone, and with it the targets there."""
        for migration in list(self._open.values()):
            if migration.target.second is session:
                self._target_lost(migration, f"engine {session.info.engine_id} was lost")

    def call_off(self, flight: Flight, index: int, reason: str) -> None:
        """The sample ends, or is resumed: its migration, if there is one, is not wanted any more."""
        migration = flight.samples[index].migration
        if migration is not None:
            self._end(migration, reason)

    def drain(self, session: SessionClient) -> None:
        """Migrate away what decodes at an engine that drains, a few at a time. Called with each of its frames."""
        engine_id = session.info.engine_id
        busy = sum(migration.source.second is session for migration in self._open.values())
        now = asyncio.get_running_loop().time()
        for attempt in [a for a in self._host.attempts if a.second is session and not a.standby]:
            for index in sorted(attempt.unfinished):
                sample = attempt.flight.samples[index]
                if busy >= self._host.config.max_migrations:
                    return
                if sample.migration is not None or now < sample.retry_migration_at or not attempt.decodes(index):
                    continue
                to = self._host.router.place_migration(
                    len(attempt.flight.request.prompt) + len(sample.tokens), engine_id
                )
                if to is None:
                    return
                sample.retry_migration_at = now + _RETRY_S * 2**sample.migration_tries
                sample.migration_tries += 1
                busy += 1
                if sample.migration_tries > _MAX_TRIES:
                    self._host.resume_elsewhere(attempt, index, f"engine {engine_id} drains", counted=False)
                    continue
                try:
                    self.start(attempt.flight, index, to)
                except (MigrationRefused, SessionLost) as error:
                    log.info("request %s: not migrated yet: %s", attempt.request.request_id, error)

    def _switch(self, migration: ClientMigration, tell_source: bool) -> None:
        source, target = migration.source, migration.target
        sample = target.flight.samples[migration.sample]
        self._close(migration, None)
        target.standby = False
        sample.attempt, sample.early, sample.migration_tries = target, [], 0
        self._host.counters.migrated += 1
        if tell_source:
            source.abort((migration.sample,))
        source.unfinished.discard(migration.sample)
        if not source.unfinished:
            self._host.forget(source)

    def _target_lost(self, migration: ClientMigration, reason: str) -> None:
        """Only the source knows whether the sample had left it."""
        if migration.target_lost is None:
            log.warning("request %s: its migration to %s failed: %s", *_names(migration), reason)
            migration.target_lost = reason
            migration.source.second.migrate(_order(migration, None))
            self._host.forget(migration.target)

    def _end(self, migration: ClientMigration, reason: str) -> None:
        self._close(migration, reason)
        self._host.counters.migrations_failed += 1
        migration.source.second.migrate(_order(migration, None))
        if migration.target_lost is None:
            migration.target.abort()
            self._host.forget(migration.target)

    def _close(self, migration: ClientMigration, outcome: str | None) -> None:
        del self._open[migration.target.request.request_id]
        migration.target.flight.samples[migration.sample].migration = None
        if not migration.done.done():
            migration.done.set_result(outcome)


def _order(migration: ClientMigration, to: PeerAddress | None) -> Migrate:
    request = migration.target.request
    return Migrate(
        migration.source.request.request_id,
        migration.sample,
        to,
        request.request_id,
        request.epoch,
        len(request.context),
    )


def _address(info: EngineInfo) -> PeerAddress:
    return PeerAddress(info.engine_id, info.generation, info.host, info.kv_port)


def _names(migration: ClientMigration) -> tuple[str, str]:
    return migration.source.request.request_id, migration.target.second.info.engine_id
