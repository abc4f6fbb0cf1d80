"""An ingress's sessions: one to each engine that the membership lists, kept up and dropped as the list says.

    listed, alive        connect, again and again with a growing pause, until it works; reconnect when it is lost
    other generation     drop the old session, connect to the new engine
    UNHEALTHY or gone    drop the session, so that its requests are resumed elsewhere at once

The list decides about engines that hang or cannot be reached; a process that dies is noticed by its socket.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.cluster.session.connection import SessionLimits
from kvbaton.engine.orders import Notice
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_REACHABLE = frozenset({EngineState.READY, EngineState.DRAINING, EngineState.SWITCHING})


class LinkEvents(Protocol):
    """What the links tell the client."""

    def connected(self, session: SessionClient, info: EngineInfo, load: EngineLoad) -> None: ...

    def changed(self, info: EngineInfo) -> None:
        """The registry entry of a connected engine says something new: a role, a state."""
        ...

    def step(self, session: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None: ...

    def notice(self, session: SessionClient, notice: Notice) -> None: ...

    def lost(self, session: SessionClient, reason: str) -> None: ...

    def removed(self, engine_id: str) -> None:
        """The engine is no longer listed."""
        ...


class EngineLinks:
    """Follows the membership list with one task an engine."""

    def __init__(self, secret: bytes, ingress_id: str, events: LinkEvents, limits: SessionLimits) -> None:
        self._secret = secret
        self._ingress_id = ingress_id
        self._events = events
        self._limits = limits
        self._links: dict[str, _Link] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def set_engines(self, engines: tuple[EngineInfo, ...]) -> None:
        """The membership's present list."""
        wanted = {info.engine_id: info for info in engines if info.state in _REACHABLE}
        listed = {info.engine_id: info for info in engines}
        for engine_id, link in list(self._links.items()):
            info = wanted.get(engine_id)
            if info is None or info.generation != link.info.generation:
                self._end(link, _reason(link.info, listed.get(engine_id)))
            elif info != link.info:
                link.info = info
                if link.session is not None and link.session.connected:
                    self._events.changed(info)
        for engine_id, info in wanted.items():
            if engine_id not in self._links:
                link = _Link(info, self._events)
                self._links[engine_id] = link
                link.task = asyncio.create_task(self._keep(link), name=f"link-{engine_id}")

    async def close(self) -> None:
        """End every session after what is queued (the last aborts) has left."""
        links = list(self._links.values())
        self._links.clear()
        tasks = [link.task for link in links if link.task is not None] + list(self._ending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(link.session.close() for link in links if link.session is not None))
        if tasks:
            await asyncio.wait(tasks)

    def _end(self, link: _Link, reason: str) -> None:
        del self._links[link.info.engine_id]
        if link.task is not None:
            link.task.cancel()
            self._ending.add(link.task)
            link.task.add_done_callback(self._ending.discard)
        if link.session is not None:
            link.session.drop(reason)
        self._events.removed(link.info.engine_id)

    async def _keep(self, link: _Link) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            session = SessionClient(link.info, self._secret, self._ingress_id, link, self._limits)
            link.session = session
            link.down.clear()
            try:
                load = await session.connect()
            except SessionLost as error:
                log.log(logging.WARNING if pause_s == _FIRST_PAUSE_S else logging.DEBUG, "%s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if session.connected:  # it may have ended since
                self._events.connected(session, link.info, load)
            pause_s = _FIRST_PAUSE_S
            await link.down.wait()
            await asyncio.sleep(pause_s)


class _Link:
    """One engine's place among the links; hears its session and passes on what it says."""

    def __init__(self, info: EngineInfo, events: LinkEvents) -> None:
        self.info = info
        self.task: asyncio.Task[None] | None = None
        self.session: SessionClient | None = None
        self.down = asyncio.Event()
        self._events = events

    def step(self, client: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        self._events.step(client, outputs, load)

    def notice(self, client: SessionClient, notice: Notice) -> None:
        self._events.notice(client, notice)

    def lost(self, client: SessionClient, reason: str) -> None:
        self.down.set()
        self._events.lost(client, reason)


def _reason(old: EngineInfo, new: EngineInfo | None) -> str:
    if new is None:
        return f"engine {old.engine_id} left the cluster"
    if new.generation != old.generation:
        return f"engine {old.engine_id} was replaced by generation {new.generation}"
    return f"engine {old.engine_id} is {new.state}" + (f": {new.reason}" if new.reason else "")
