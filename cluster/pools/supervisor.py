"""Keeps one engine alive: starts it, watches it, replaces it under a new generation when it dies.

    STARTING ──ready──> READY ──dies──> DEAD ──wait──> STARTING (generation + 1)
        └────────────fails to start──────^

The first replacement comes at once; after each further failure the next one waits, twice as long each time up to a
limit. Once an engine has been up for a while, its failures are counted from the beginning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
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


class Generations(Protocol):
    """Numbers the incarnations of engines, for longer than a manager lives."""

    async def next_generation(self, engine_id: str) -> int:
        """A number higher than any given out for this id before. Raises `StateUnavailable`."""
        ...


class StateUnavailable(EngineFailed):
    """The shared state cannot be reached; what depends on it is tried again later."""


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


class Restarts:
    """How often one engine has failed in a row, and how long its next start waits for that."""

    def __init__(self, clock: Clock, backoff: Backoff) -> None:
        self.failures = 0
        self._clock = clock
        self._backoff = backoff
        self._up_since = clock.now()

    def up(self) -> None:
        self._up_since = self._clock.now()

    def failed_to_start(self) -> None:
        self.failures += 1

    def died(self) -> None:
        """The death of an engine that was up for long enough counts as a first one."""
        stable = self._clock.now() - self._up_since >= self._backoff.stable_s
        self.failures = 1 if stable else self.failures + 1

    async def wait(self) -> None:
        await self._clock.sleep(self._backoff.delay_s(self.failures))


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine as operators see it. `failures` counts deaths and failed starts in a row; `info` is set when READY."""

    engine_id: str
    generation: int
    role: Role
    state: EngineState
    reason: str = ""
    failures: int = 0
    info: EngineInfo | None = None

    @property
    def ready(self) -> bool:
        return self.state is EngineState.READY


class EngineSupervisor:
    """One engine id through all its incarnations, from `start` to `stop`. `on_change` hears of every new status."""

    def __init__(
        self,
        engine_id: str,
        role: Role,
        factory: EngineFactory,
        generations: Generations,
        restarts: Restarts,
        on_change: Callable[[], None],
        adopted: RunningEngine | None = None,
    ) -> None:
        """With `adopted` the engine is up already, and only its replacements are started."""
        self._engine_id = engine_id
        self._role = role
        self._factory = factory
        self._generations = generations
        self._restarts = restarts
        self._on_change = on_change
        self._state = EngineState.STARTING if adopted is None else EngineState.READY
        self._reason = ""
        self._generation = 0 if adopted is None else adopted.info.generation
        self._engine = adopted
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"supervise-{self._engine_id}")

    @property
    def status(self) -> EngineStatus:
        info = self._engine.info if self._engine is not None else None
        failures = self._restarts.failures
        return EngineStatus(self._engine_id, self._generation, self._role, self._state, self._reason, failures, info)

    async def switch(self, role: Role) -> None:
        """Change the role: now if the engine is up, else with its next start."""
        self._role = role
        engine = self._engine
        if engine is None:
            return
        self._to(EngineState.SWITCHING, f"to {role}")
        try:
            await engine.set_role(role)
        except EngineFailed as error:
            log.warning("%s did not become %s: %s", self._engine_id, role, error)
            await engine.stop()  # `_run` sees it die and starts one in the right role
            return
        if self._engine is engine:
            self._to(EngineState.READY)

    async def stop(self) -> None:
        """End the engine and its supervision; returns when both are gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    async def _run(self) -> None:
        while True:
            if self._engine is None:
                await self._start_one()
            if self._engine is not None:
                reason = await self._engine.died()
                self._engine = None
                self._restarts.died()
                self._dead(reason)
            await self._restarts.wait()

    async def _start_one(self) -> None:
        """Start the next incarnation; `_engine` stays None if that fails."""
        try:
            self._generation = await self._next_generation()
            self._to(EngineState.STARTING)
            spec = EngineSpec(self._engine_id, self._generation, self._role)
            self._engine = await self._factory.start(spec)
        except EngineFailed as error:
            self._not_started(str(error))
        except Exception as error:  # supervision must outlive what it did not foresee
            log.exception("%s: unexpected failure at start", self._engine_id)
            self._not_started(f"{type(error).__name__}: {error}")
        else:
            await self._settle_role(spec.role)
            self._restarts.up()

    async def _next_generation(self) -> int:
        """Above every one that was used here: a store that lost its data counts from 1 again."""
        generation = 0
        while generation <= self._generation:
            generation = await self._generations.next_generation(self._engine_id)
        return generation

    async def _settle_role(self, started_as: Role) -> None:
        """READY, after a switch that was asked for while the engine started."""
        if self._role is started_as:
            self._to(EngineState.READY)
        else:
            await self.switch(self._role)

    def _not_started(self, reason: str) -> None:
        self._restarts.failed_to_start()
        self._dead(reason)

    def _dead(self, reason: str) -> None:
        log.warning("%s generation %d is dead: %s", self._engine_id, self._generation, reason)
        self._to(EngineState.DEAD, reason)

    def _to(self, state: EngineState, reason: str = "") -> None:
        self._state, self._reason = state, reason
        self._on_change()
