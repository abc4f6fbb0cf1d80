"""Samples that migrate from one decode engine to another while they stream: the ingress's half.

    start ──> a MIGRATION leg at the target, an order at the source ──> the target's tokens begin where the source's end
      the source says migrated, or the target sends the token that is next     the sample is the target's
      the source says that it goes on                                       the target's leg is aborted
      the target is lost                                                    the source goes on if it can, and says so
      the source is lost, or the sample ends                                both legs end; a lost one is resumed

The target's tokens may overtake the source's last ones, which come over another connection: they wait. What follows for
a sample is returned, as outputs to take or as `Recompute`, and done by the caller.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from kvbaton.cluster.client.attempts import Attempts, address_of
from kvbaton.cluster.client.live_request import (
    Attempt,
    ClientMigration,
    EngineSession,
    LiveRequest,
    Timers,
    resume_request,
)
from kvbaton.cluster.client.settings import ClientCounters
from kvbaton.cluster.session.client import SessionLost
from kvbaton.engine.orders import Migrate, Migrated
from kvbaton.engine.request import FinishReason, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.router import Router

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_MAX_TRIES = 4


class MigrationRefused(RuntimeError):
    """A sample that cannot be migrated now, and why."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """The sample has to be computed anew at another engine than its attempt's; `counted` as one of its resumes."""

    attempt: Attempt
    sample: int
    reason: str
    counted: bool


class ClientMigrations:
    """Every migration of this ingress. Lives on the client's event loop."""

    def __init__(
        self, attempts: Attempts, router: Router, counters: ClientCounters, timers: Timers, max_per_engine: int
    ) -> None:
        """At most `max_per_engine` samples at a time leave an engine that drains."""
        self._attempts = attempts
        self._router = router
        self._counters = counters
        self._timers = timers
        self._max_per_engine = max_per_engine
        self._open: dict[str, ClientMigration] = {}  # by the request id of the target's leg

    def __len__(self) -> int:
        return len(self._open)

    def start(self, live: LiveRequest, index: int, to: EngineInfo) -> ClientMigration:
        """Begin. Raises `MigrationRefused`, `SessionLost`; its `done` tells why it failed, or None."""
        sample = live.samples[index]
        source = sample.attempt
        if source is None or sample.done or sample.migration is not None:
            raise MigrationRefused("the sample is not at one engine")
        if not source.decodes(index):
            raise MigrationRefused("its prompt is still being computed")
        if source.second.info.engine_id == to.engine_id:
            raise MigrationRefused(f"it is at {to.engine_id} already")
        live.epoch += 1
        request = resume_request(live, index, self._timers.now())
        target = self._attempts.migrate(live, request, source.second.info, to)
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        migration = ClientMigration(index, source, target, done)
        self._open[request.request_id] = sample.migration = migration
        source.second.migrate(_order(migration, address_of(to)))
        return migration

    def start_all(self, attempt: Attempt, to: str | None) -> None:
        """Begin for each sample of an attempt, as its engine wishes: to the engine `to`, None: where there is room. One
        that cannot migrate stays."""
        source = attempt.second.info.engine_id
        for index in sorted(attempt.unfinished):
            try:
                self.start(attempt.live, index, self._target(attempt, source, to))
            except (MigrationRefused, SessionLost) as error:
                log.warning("request %s: not migrated from %s: %s", attempt.request.request_id, source, error)

    def _target(self, attempt: Attempt, source: str, to: str | None) -> EngineInfo:
        """Raises `MigrationRefused`."""
        if to is None:
            found = self._router.place_migration(len(attempt.request.context), source)
        else:
            view = self._router.view(to)
            found = None if view is None else view.info
        if found is None:
            raise MigrationRefused("no other engine" if to is None else f"no engine {to}")
        return found

    def output(self, target: Attempt, output: TokenOutput) -> list[TokenOutput]:
        """An output of a target that does not own its sample yet. Returned once it does."""
        migration = self._open.get(target.request.request_id)
        if migration is None:
            return []
        if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._target_lost(migration, output.error or str(output.finish))
            return []
        expected = len(target.live.samples[migration.sample].tokens)
        if output.index == expected:
            self._switch(migration, tell_source=True)
            return [output]
        if output.index > expected and (not migration.ahead or output.index == migration.ahead[-1].index + 1):
            migration.ahead.append(output)
        return []

    def told(self, session: EngineSession, migrated: Migrated) -> list[TokenOutput] | Recompute:
        """A source tells how a migration ended. Returns the outputs of the target that waited for this."""
        migration = self._open.get(migrated.new_id)
        if (
            migration is None
            or migration.source.second is not session
            or migration.target.request.epoch != migrated.new_epoch
        ):
            return []
        if migrated.refusal is not None:
            self._end(migration, migration.target_lost or migrated.refusal)
            return []
        if migration.target_lost is not None:
            reason = f"migrated to {migration.target.second.info.engine_id}, which was lost"
            self._end(migration, reason)
            return Recompute(migration.source, migration.sample, reason, counted=True)
        self._switch(migration, tell_source=False)
        return migration.ahead

    def lost(self, session: EngineSession) -> None:
        """A connection is gone, and with it the targets there."""
        for migration in list(self._open.values()):
            if migration.target.second is session:
                self._target_lost(migration, f"engine {session.info.engine_id} was lost")

    def call_off(self, live: LiveRequest, index: int, reason: str) -> None:
        """The sample ends, or is resumed: its migration, if there is one, is not wanted any more."""
        migration = live.samples[index].migration
        if migration is not None:
            self._end(migration, reason)

    def drain(self, session: EngineSession) -> list[Recompute]:
        """Migrate away what decodes at an engine that drains, a few at a time. Called with each of its frames. Returns
        the samples that could not be migrated time and again."""
        engine_id = session.info.engine_id
        stuck: list[Recompute] = []
        busy = sum(migration.source.second is session for migration in self._open.values())
        now = self._timers.now()
        for attempt in [a for a in self._attempts if a.second is session and not a.standby]:
            for index in sorted(attempt.unfinished):
                sample = attempt.live.samples[index]
                if busy >= self._max_per_engine:
                    return stuck
                if sample.migration is not None or now < sample.retry_migration_at or not attempt.decodes(index):
                    continue
                to = self._router.place_migration(len(attempt.live.request.prompt) + len(sample.tokens), engine_id)
                if to is None:
                    return stuck
                sample.retry_migration_at = now + _RETRY_S * 2**sample.migration_tries
                sample.migration_tries += 1
                busy += 1
                if sample.migration_tries > _MAX_TRIES:
                    stuck.append(Recompute(attempt, index, f"engine {engine_id} drains", counted=False))
                    continue
                try:
                    self.start(attempt.live, index, to)
                except (MigrationRefused, SessionLost) as error:
                    log.info("request %s: not migrated yet: %s", attempt.request.request_id, error)
        return stuck

    def _switch(self, migration: ClientMigration, tell_source: bool) -> None:
        source, target = migration.source, migration.target
        sample = target.live.samples[migration.sample]
        self._close(migration, None)
        target.standby = False
        sample.attempt, sample.early, sample.migration_tries = target, [], 0
        self._counters.migrated += 1
        if tell_source:
            source.abort((migration.sample,))
        source.unfinished.discard(migration.sample)
        if not source.unfinished:
            self._attempts.end(source)

    def _target_lost(self, migration: ClientMigration, reason: str) -> None:
        """Only the source knows whether the sample had left it."""
        if migration.target_lost is None:
            source, target = migration.source.request.request_id, migration.target.second.info.engine_id
            log.warning("request %s: its migration to %s failed: %s", source, target, reason)
            migration.target_lost = reason
            migration.source.second.migrate(_order(migration, None))
            self._attempts.end(migration.target)

    def _end(self, migration: ClientMigration, reason: str) -> None:
        self._close(migration, reason)
        self._counters.migrations_failed += 1
        migration.source.second.migrate(_order(migration, None))
        if migration.target_lost is None:
            migration.target.abort()
            self._attempts.end(migration.target)

    def _close(self, migration: ClientMigration, outcome: str | None) -> None:
        del self._open[migration.target.request.request_id]
        migration.target.live.samples[migration.sample].migration = None
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
