"""Keeps one engine alive: start it, watch it, replace it under a new generation when it dies.

    STARTING ──ready──> READY ──dies──> DEAD ──wait──> STARTING (generation + 1)
        └────────────fails to start──────^

The first replacement comes at once; one that fails again waits, twice as long each time up to a limit. An engine that
has been up for a while starts from the beginning of that row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbaton.router.engine_info import EngineInfo, EngineState, Role

log = logging.getLogger(__name__)


class EngineFailed(Exception):
    """An engine did not start, or cannot be reached any more; the message is fit for an operator."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which incarnation of which engine to start, in which role."""

    engine_id: str
    generation: int
    role: Role


class RunningEngine(Protocol):
    """An engine that is up."""

    @property
    def info(self) -> EngineInfo: ...

    async def set_role(self, role: Role) -> None:
        """Raises `EngineFailed`."""
        ...

    async def died(self) -> str:
        """Returns the reason when the engine is dead, however that came about."""
        ...

    async def stop(self) -> None:
        """End it, with force if need be. Does not raise for an engine that is dead already."""
        ...


class EngineFactory(Protocol):
    """Starts engines: as Ray actors in production, scripted in tests."""

    async def start(self, spec: EngineSpec) -> RunningEngine:
        """Returns when the engine is ready. Raises `EngineFailed`; cancelled, it leaves nothing behind."""
        ...

    async def existing(self) -> Sequence[RunningEngine]:
        """Engines that an earlier manager started and that are still up."""
        ...


class Clock(Protocol):
    """Time, so that tests can move it by hand."""

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next start. `stable_s` up resets the count of failures."""

    first_s: float = 1.0
    limit_s: float = 30.0
    stable_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """0 after the first failure, then `first_s`, doubling up to `limit_s`."""
        if failures <= 1:
            return 0.0
        return float(min(self.limit_s, self.first_s * 2.0 ** min(failures - 2, 32)))


@dataclass(frozen=True, slots=True)
class KeeperTools:
    """What every keeper of a manager shares."""

    factory: EngineFactory
    next_generation: Callable[[str], Awaitable[int]]
    clock: Clock
    backoff: Backoff
    on_change: Callable[[], None]


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine as operators see it. `failures` counts deaths and failed starts in a row; `info` is set when READY."""

    engine_id: str
    generation: int
    role: Role
    state: EngineState
    reason: str
    failures: int
    info: EngineInfo | None


class EngineKeeper:
    """One engine id through all its incarnations. `run` is its life; `stop` ends it."""

    def __init__(self, engine_id: str, role: Role, tools: KeeperTools, adopted: RunningEngine | None = None) -> None:
        """With `adopted` the engine is up already, and only its replacements are started."""
        self.engine_id = engine_id
        self.role = role
        self._tools = tools
        self._state = EngineState.STARTING if adopted is None else EngineState.READY
        self._reason = ""
        self._generation = 0 if adopted is None else adopted.info.generation
        self._failures = 0
        self._engine = adopted
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"keeper-{self.engine_id}")

    @property
    def ready(self) -> bool:
        return self._state is EngineState.READY

    def view(self) -> EngineView:
        info = self._engine.info if self._engine is not None else None
        return EngineView(self.engine_id, self._generation, self.role, self._state, self._reason, self._failures, info)

    async def switch(self, role: Role) -> None:
        """Change the role, now if the engine is up, else with its next start."""
        self.role = role
        engine = self._engine
        if engine is None:
            return
        self._to(EngineState.SWITCHING, f"to {role}")
        try:
            await engine.set_role(role)
        except EngineFailed as error:
            log.warning("%s did not become %s: %s", self.engine_id, role, error)
            await engine.stop()  # `_run` sees it die and starts one in the right role
            return
        if self._engine is engine:
            self._to(EngineState.READY)

    async def stop(self) -> None:
        """End the engine and its keeper; returns when both are gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    async def _run(self) -> None:
        while True:
            up_since = self._tools.clock.now() if self._engine is not None else await self._start_one()
            if self._engine is not None:
                reason = await self._engine.died()
                self._engine = None
                if self._tools.clock.now() - up_since >= self._tools.backoff.stable_s:
                    self._failures = 0
                self._failed(reason)
            await self._tools.clock.sleep(self._tools.backoff.delay_s(self._failures))

    async def _start_one(self) -> float:
        """Start the next incarnation; returns since when it is up. `_engine` stays None if it failed."""
        try:
            self._generation = await self._next_generation()
            self._to(EngineState.STARTING)
            spec = EngineSpec(self.engine_id, self._generation, self.role)
            self._engine = await self._tools.factory.start(spec)
        except EngineFailed as error:
            self._failed(str(error))
        except Exception as error:  # a keeper must outlive what it did not foresee
            log.exception("%s: unexpected failure at start", self.engine_id)
            self._failed(f"{type(error).__name__}: {error}")
        else:
            await self._settle_role(spec.role)
        return self._tools.clock.now()

    async def _next_generation(self) -> int:
        """Above every one that this keeper has used: a store that lost its data counts from 1 again."""
        generation = 0
        while generation <= self._generation:
            generation = await self._tools.next_generation(self.engine_id)
        return generation

    async def _settle_role(self, started_as: Role) -> None:
        """READY, after a switch that was asked for while the engine started."""
        if self.role is started_as:
            self._to(EngineState.READY)
        else:
            await self.switch(self.role)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        log.warning("%s generation %d is dead: %s", self.engine_id, self._generation, reason)
        self._to(EngineState.DEAD, reason)

    def _to(self, state: EngineState, reason: str = "") -> None:
        self._state, self._reason = state, reason
        self._tools.on_change()
