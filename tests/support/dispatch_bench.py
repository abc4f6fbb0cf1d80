"""Dispatch and its neighbours over sessions that only record, and on a clock that a test moves: no network, no waiting.

Engines say what a test has them say (`Bench.say`); what they were told is in their session.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from kvbaton.cluster.client.attempts import Attempts
from kvbaton.cluster.client.dispatch import Dispatch
from kvbaton.cluster.client.live_request import LiveRequest
from kvbaton.cluster.client.migration import ClientMigrations
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionLost
from kvbaton.engine.orders import Migrate, Submit
from kvbaton.engine.request import Request, TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, Role
from kvbaton.router.router import Router
from support.client_support import NO_LOCAL_PREFILL
from support.session_support import make_info

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "h": Role.HYBRID}


class RecordedSession:
    """An `EngineSession` that keeps what it was given, in order."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        self.connected = True
        self.submits: list[Submit] = []
        self.aborts: list[tuple[str, int | None]] = []
        self.orders: list[Migrate] = []

    def submit(self, submit: Submit) -> None:
        if not self.connected:
            raise SessionLost(f"engine {self.info.engine_id}: no session")
        self.submits.append(submit)

    def abort(self, request_id: str, sample: int | None = None) -> None:
        if self.connected:
            self.aborts.append((request_id, sample))

    def migrate(self, order: Migrate) -> None:
        if self.connected:
            self.orders.append(order)


class HandTimer:
    """A call that `HandTimers.advance` makes, unless it is cancelled first."""

    def __init__(self, due_s: float, call: Callable[[], None]) -> None:
        self.due_s = due_s
        self.call = call
        self.pending = True

    def cancel(self) -> None:
        self.pending = False


class HandTimers:
    """`Timers` that stand still until `advance`."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._timers: list[HandTimer] = []

    def now(self) -> float:
        return self._now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        self._timers.append(HandTimer(self._now_s + delay_s, call))
        return self._timers[-1].cancel

    @property
    def pending(self) -> int:
        return sum(timer.pending for timer in self._timers)

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        for timer in [timer for timer in self._timers if timer.pending and timer.due_s <= self._now_s]:
            if timer.pending:  # an earlier one may have cancelled it
                timer.pending = False
                timer.call()


async def read_now(live: LiveRequest) -> list[TokenOutput] | None:
    """What can be read at once: the empty list at the end, None where a reader would wait. Raises what it ends with."""
    reading = asyncio.create_task(live.read())
    await asyncio.sleep(0)
    if reading.done():
        return reading.result()
    reading.cancel()
    return None


class Bench:
    """Engines by name (p0 prefills, d0 decodes, h0 does both) and the dispatch of one ingress."""

    def __init__(self, *engines: str, config: ClientConfig | None = None) -> None:
        self.timers = HandTimers()
        self.counters = ClientCounters()
        self.router = Router(NO_LOCAL_PREFILL, self.timers.now, random.Random(0))
        self.attempts = Attempts(self.router)
        config = config or ClientConfig()
        self.migrations = ClientMigrations(
            self.attempts, self.router, self.counters, self.timers, config.max_migrations
        )
        self.dispatch = Dispatch(config, self.router, self.attempts, self.migrations, self.counters, self.timers)
        self._sessions: dict[str, RecordedSession] = {}
        for name in engines:
            self.add(name)

    def __getitem__(self, name: str) -> RecordedSession:
        return self._sessions[name]

    def known(self, name: str) -> bool:
        return name in self._sessions

    def add(self, name: str, generation: int = 1, max_requests: int = 4096) -> RecordedSession:
        """An engine can be reached, as the client is told of it."""
        info = make_info(name, generation=generation, role=ROLES[name[0]], max_requests=max_requests)
        session = RecordedSession(info)
        self._sessions[name] = session
        self.attempts.connected(session)
        self.router.add(session.info)
        self.dispatch.retry_parked()
        return session

    def lose(self, name: str) -> None:
        """Its session breaks."""
        session = self._sessions[name]
        session.connected = False
        self.router.unreachable(name)
        self.dispatch.lost(session, "cut")

    def begin(self, request: Request) -> LiveRequest:
        live = LiveRequest(request)
        self.dispatch.begin(live)
        return live

    def say(self, name: str, *outputs: TokenOutput) -> None:
        """One step of an engine."""
        self.dispatch.step(self._sessions[name], list(outputs))

    def observe(self, name: str) -> None:
        """A frame of an engine that has room, and says nothing else."""
        self.router.observe(name, EngineLoad())
        self.say(name)

    def assert_empty(self) -> None:
        """Nothing is left of any request: no attempt, no migration, no timer, and the router's book is clean."""
        assert (len(self.attempts), len(self.migrations), self.timers.pending) == (0, 0, 0)
        for info in self.router.engines:
            view = self.router.view(info.engine_id)
            assert view is not None
            assert (view.own_prefill_tokens, view.own_requests, view.own_context_tokens, view.own_legs) == (
                0,
                0,
                0,
                0,
            ), info.engine_id
