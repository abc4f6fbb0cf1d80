"""The cluster as one engine: `generate` places a request, merges the tokens of its engines, and survives their loss.

    place ──> submit to both legs at once ──> outputs of both connections, put in order ──> end, or
      ^                                                                                      aclose: abort on both legs
      ├── an engine drains, or somebody asks: a sample migrates to another decode engine (`client/migration.py`)
      └── an engine is lost, reports an error, or a token is missing: abort the legs, resume each unfinished sample with
          what it has as `emitted`, on other engines, `max_resumes` times; with no engine at all wait `park_s` for one

Randomness is keyed by (seed, position), so a resumed sample draws the tokens that it would have drawn. Below this file:
`dispatch` decides, `migration` moves samples, both on the table of `attempts`; `links` keeps the sessions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from kvbaton.cluster.client.api import Cancelled, Overloaded, ShuttingDown
from kvbaton.cluster.client.attempts import Attempts
from kvbaton.cluster.client.dispatch import Dispatch
from kvbaton.cluster.client.links import EngineLinks
from kvbaton.cluster.client.live_request import EngineSession, LiveRequest, LoopTimers
from kvbaton.cluster.client.migration import ClientMigrations, MigrationRefused
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.messages import check_sendable
from kvbaton.cluster.store.registry import Membership
from kvbaton.engine.orders import Notice
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
        self.attempts = Attempts(router)
        timers, most = LoopTimers(), self.config.max_migrations
        self.migrations = ClientMigrations(self.attempts, router, self.counters, timers, most)
        self._dispatch = Dispatch(self.config, router, self.attempts, self.migrations, self.counters, timers)
        self._membership = membership
        self._links = EngineLinks(secret, ingress_id, self, self.config.limits)
        self._links_changed = asyncio.Event()
        self._live: dict[str, LiveRequest] = {}
        self._draining: set[str] = set()
        self._closing = False

    async def start(self) -> None:
        """Follow the membership list, which the caller starts and closes; connecting goes on in the background."""
        self._membership.subscribe(self._links.set_engines)

    def stop(self) -> None:
        """Abort what is in flight, whose streams end with `ShuttingDown`, as do those that still come."""
        self._closing = True
        for live in list(self._live.values()):
            self._dispatch.end(live, _shutting_down())

    async def close(self) -> None:
        """`stop`, and end every session."""
        self.stop()
        await self._links.close()

    @property
    def in_flight(self) -> int:
        return len(self._live)

    # -- GenerationClient --

    async def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        """See `GenerationClient`."""
        check_sendable(request)
        if self._closing:
            raise _shutting_down()
        if request.request_id in self._live:
            raise InvalidRequest(f"a request with id {request.request_id!r} is in flight")
        if len(self._live) >= self.config.max_in_flight:
            self.counters.refused += 1
            raise Overloaded(f"{len(self._live)} requests are in flight at this ingress", 1.0)
        limits = [limit for limit in (request.timeout_s, self.config.request_timeout_s) if limit is not None]
        live = LiveRequest(replace(request, timeout_s=min(limits)) if limits else request)
        self._live[request.request_id] = live
        try:
            self._dispatch.begin(live)
            while outputs := await live.read():
                yield outputs
        finally:
            del self._live[request.request_id]
            self._dispatch.end(live)

    def cancel(self, request_id: str) -> bool:
        """End a request of this ingress, in whatever state it is: its stream fails with `Cancelled`. False if there is
        no such request."""
        live = self._live.get(request_id)
        if live is None:
            return False
        self._dispatch.end(live, Cancelled("the request was cancelled"))
        return True

    def start_migration(self, request_id: str, sample: int, to: str) -> asyncio.Future[str | None]:
        """Begin to migrate a sample that decodes to the engine `to`. The future tells why it stayed where it was, None
        if it moved. Raises `MigrationRefused` where it cannot begin, `SessionLost`."""
        live = self._live.get(request_id)
        view = self.router.view(to)
        if live is None or sample not in live.samples or view is None:
            raise MigrationRefused("no such request" if view is not None else f"no engine {to}")
        return self.migrations.start(live, sample, view.info).done

    async def migrate(self, request_id: str, sample: int, to: str) -> str | None:
        """`start_migration`, and wait for its end; a caller that is cancelled does not stop it."""
        return await asyncio.shield(self.start_migration(request_id, sample, to))

    def finish_sample(self, request_id: str, sample: int) -> None:
        """See `GenerationClient`. Unknown ids and samples that are done are fine."""
        live = self._live.get(request_id)
        if live is not None:
            self._dispatch.finish_sample(live, sample)

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

    def connected(self, session: EngineSession, info: EngineInfo, load: EngineLoad) -> None:
        self.attempts.connected(session)
        self.router.add(info)
        self.router.observe(info.engine_id, load)
        self.changed(info)

    def changed(self, info: EngineInfo) -> None:
        self.router.add(info)
        if info.state is EngineState.DRAINING:  # with its next frames its samples begin to migrate away
            self._draining.add(info.engine_id)
        else:
            self._draining.discard(info.engine_id)
        self._links_changed.set()
        self._links_changed = asyncio.Event()
        self._dispatch.retry_parked()

    def removed(self, engine_id: str) -> None:
        self._draining.discard(engine_id)
        self.router.remove(engine_id)

    def step(self, session: EngineSession, outputs: list[TokenOutput], load: EngineLoad) -> None:
        self.router.observe(session.info.engine_id, load)
        self._dispatch.step(session, outputs)
        if session.info.engine_id in self._draining:
            self._dispatch.drain(session)

    def notice(self, session: EngineSession, notice: Notice) -> None:
        self._dispatch.notice(session, notice)

    def lost(self, session: EngineSession, reason: str) -> None:
        engine_id = session.info.engine_id
        log.log(logging.INFO if self._closing else logging.WARNING, "engine %s: session lost: %s", engine_id, reason)
        view = self.router.view(engine_id)
        if view is not None and view.info.generation == session.info.generation:
            self.router.unreachable(engine_id)
        self._dispatch.lost(session, reason)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down")
