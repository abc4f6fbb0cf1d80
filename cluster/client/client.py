"""The cluster as one engine: `generate` places a request, merges the tokens of its engines, and survives their loss.

    place ──> submit to both legs at once ──> outputs of both connections, put in order ──> end, or
      ^                                                                                      aclose: abort on both legs
      ├── an engine drains, or somebody asks: a sample moves to another decode engine (`client/migration.py`)
      └── an engine is lost, reports an error, or a token is missing: abort the legs, resume each unfinished sample with
          what it has as `emitted`, on other engines, `max_resumes` times; with no engine at all wait `park_s` for one

Randomness is keyed by (seed, position), so a resumed sample draws the tokens that it would have drawn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from kvbaton.cluster.client.api import Cancelled, Overloaded, ShuttingDown
from kvbaton.cluster.client.dispatch import Dispatch
from kvbaton.cluster.client.links import EngineLinks
from kvbaton.cluster.client.live_request import Attempt, Flight
from kvbaton.cluster.client.migration import MigrationRefused
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.cluster.session.requests import check_sendable
from kvbaton.cluster.store.registry import Membership
from kvbaton.engine.orders import Migrated, Notice
from kvbaton.engine.request import InvalidRequest, Request, TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.router import Router

log = logging.getLogger(__name__)


__all__ = ["ClientConfig", "ClientCounters", "ClusterClient"]


class ClusterClient:
    """A `GenerationClient` over the engines of a membership list. One per ingress process, on one event loop."""

    def __init__(
        self,
        membership: Membership,
        router: Router,
        secret: bytes,
        ingress_id: str,
        config: ClientConfig | None = None,
    ) -> None:
        self.config = config or ClientConfig()
        self.router = router
        self.counters = ClientCounters()
        self._membership = membership
        self._links = EngineLinks(secret, ingress_id, self, self.config.limits)
        self._flights: dict[str, Flight] = {}
        self._closing = False
        self._dispatch = Dispatch(self.config, router, self.counters, self._find_session)
        self._attempts = self._dispatch.by_id
        self._links_changed = asyncio.Event()
        self._draining: set[str] = set()
        self.migrations = self._dispatch.migrations

    async def start(self) -> None:
        """Follow the membership list, which the caller starts and closes; connecting goes on in the background."""
        self._membership.subscribe(self._links.set_engines)

    def stop(self) -> None:
        """Abort what is in flight, whose streams end with `ShuttingDown`, as do those that still come."""
        self._closing = True
        for flight in list(self._flights.values()):
            self._dispatch.abandon(flight)
            flight.fail(_shutting_down())

    async def close(self) -> None:
        """`stop`, and end every session."""
        self.stop()
        await self._links.close()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    # -- GenerationClient --

    async def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        """See `GenerationClient`."""
        check_sendable(request)
        if self._closing:
            raise _shutting_down()
        if request.request_id in self._flights:
            raise InvalidRequest(f"a request with id {request.request_id!r} is in flight")
        if len(self._flights) >= self.config.max_in_flight:
            self.counters.refused += 1
            raise Overloaded(f"{len(self._flights)} requests are in flight at this ingress", 1.0)
        limits = [limit for limit in (request.timeout_s, self.config.request_timeout_s) if limit is not None]
        timeout_s = min(limits, default=None)
        flight = Flight(request if timeout_s is None else replace(request, timeout_s=timeout_s))
        self._flights[request.request_id] = flight
        timer = None if timeout_s is None else self._dispatch.start_timer(flight, timeout_s)
        try:
            self._dispatch.begin(flight)
            while outputs := await flight.read():
                yield outputs
        finally:
            if timer is not None:
                timer.cancel()
            del self._flights[request.request_id]
            self._dispatch.abandon(flight)

    def cancel(self, request_id: str) -> bool:
        """End a request of this ingress, in whatever state it is: its stream fails with `Cancelled`. False if there is
        no such request."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        self._dispatch.abandon(flight)
        flight.fail(Cancelled("the request was cancelled"))
        return True

    async def migrate(self, request_id: str, sample: int, to: str) -> str | None:
        """Migrate a sample that decodes to the engine `to`. Returns why it stayed where it was, None if it moved.
        Raises `MigrationRefused` where it cannot begin, `SessionLost`."""
        flight = self._flights.get(request_id)
        view = self.router.view(to)
        if flight is None or sample not in flight.samples or view is None:
            raise MigrationRefused("no such request" if view is not None else f"no engine {to}")
        return await asyncio.shield(self.migrations.start(flight, sample, view.info).done)

    def finish_sample(self, request_id: str, sample: int) -> None:
        """See `GenerationClient`. Unknown ids and samples that are done are fine."""
        flight = self._flights.get(request_id)
        held = None if flight is None else flight.samples.get(sample)
        if flight is None or held is None or held.done:
            return
        held.done = True
        self.migrations.call_off(flight, sample, "the sample is done")
        if held.attempt is not None:
            held.attempt.abort((sample,))
            self._dispatch.sample_done(held.attempt, sample)
        flight.wake()

    def ready(self) -> bool:
        """See `GenerationClient`. A role that no engine in the list has is served by the others: no need to wait."""
        connected = {info.role for info in self.router.engines if info.state is EngineState.READY}
        listed = {info.role for info in self._membership.engines if info.state is not EngineState.UNHEALTHY}
        if not connected:
            return False
        missing = {Role.PREFILL, Role.DECODE} - connected
        return Role.HYBRID in connected or not (missing & listed)

    async def wait_ready(self) -> None:
        """Returns when `ready` is true; there is no limit but the caller's."""
        while not self.ready():
            await self._links_changed.wait()

    # -- LinkEvents --

    def connected(self, session: SessionClient, info: EngineInfo, load: EngineLoad) -> None:
        self.router.add(info)
        self._note_draining(info)
        self.router.observe(info.engine_id, load)
        self._tell_links_changed()

    def changed(self, info: EngineInfo) -> None:
        self.router.add(info)
        self._note_draining(info)
        self._tell_links_changed()

    def _note_draining(self, info: EngineInfo) -> None:
        """With its next frames its samples begin to migrate away."""
        if info.state is EngineState.DRAINING:
            self._draining.add(info.engine_id)
        else:
            self._draining.discard(info.engine_id)

    def _tell_links_changed(self) -> None:
        self._links_changed.set()
        self._links_changed = asyncio.Event()
        self._dispatch.retry_parked(self._flights.values())

    def removed(self, engine_id: str) -> None:
        self._draining.discard(engine_id)
        self.router.remove(engine_id)

    def step(self, session: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        """One engine step: sort its tokens into their flights, then wake each reader once."""
        self.router.observe(session.info.engine_id, load)
        touched: dict[int, Flight] = {}
        failed: list[tuple[Attempt, int, str]] = []
        for output in outputs:
            attempt = self._attempts.get(output.request_id)
            if attempt is None or output.epoch != attempt.request.epoch:
                self.counters.stale_outputs += 1
                continue
            if attempt.standby:
                self.migrations.output(attempt, session, output)
                touched[id(attempt)] = attempt.flight
                continue
            reason = self._dispatch.take(attempt, session, output)
            if reason is not None:
                failed.append((attempt, output.sample, reason))
            touched[id(attempt)] = attempt.flight
        self._dispatch.settle_failures(failed, session)
        for flight in touched.values():
            flight.wake()
        if session.info.engine_id in self._draining:
            self.migrations.drain(session)

    def notice(self, session: SessionClient, notice: Notice) -> None:
        """An engine's word about a migration, or its wish for one."""
        if isinstance(notice, Migrated):
            self.migrations.told(session, notice)
            return
        attempt = self._attempts.get(notice.request_id)
        if attempt is None or attempt.second is not session or attempt.standby:
            return
        for index in sorted(attempt.unfinished):
            self._migrate_if_possible(attempt, index, notice.to)

    def _migrate_if_possible(self, attempt: Attempt, index: int, to: str | None) -> None:
        source = attempt.second.info.engine_id
        try:
            if to is None:
                target = self.router.place_migration(len(attempt.request.context), source)
            else:
                view = self.router.view(to)
                target = None if view is None else view.info
            if target is None:
                raise MigrationRefused("no other engine" if to is None else f"no engine {to}")
            self.migrations.start(attempt.flight, index, target)
        except (MigrationRefused, SessionLost) as error:
            log.warning("request %s: not migrated from %s: %s", attempt.request.request_id, source, error)

    def lost(self, session: SessionClient, reason: str) -> None:
        """Resume what depended on this engine."""
        engine_id = session.info.engine_id
        log.log(logging.INFO if self._closing else logging.WARNING, "engine %s: session lost: %s", engine_id, reason)
        view = self.router.view(engine_id)
        if view is not None and view.info.generation == session.info.generation:
            self.router.unreachable(engine_id)
        self.migrations.lost(session)
        for attempt in [attempt for attempt in self._attempts.values() if not attempt.standby]:
            self._dispatch.fail(
                attempt, attempt.needing(session), f"engine {engine_id}: {reason}", frozenset((engine_id,))
            )

    def _find_session(self, info: EngineInfo) -> SessionClient | None:
        return self._links.session(info)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down")
