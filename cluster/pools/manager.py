"""`PoolManager`: makes the engines that exist equal to the pools that are wanted. Plain asyncio, no Ray.

    desired pools (store) ──> plan ──> switch roles, start, stop
    engines ──die──> their supervisor replaces them under a new generation, by itself

It is never on the request path: ingresses find engines in the registry, and go on without a manager.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools.plan import PoolPlan, free_ids, plan_pools
from kvbaton.cluster.pools.supervisor import (
    Backoff,
    Clock,
    EngineFactory,
    EngineStatus,
    EngineSupervisor,
    Generations,
    Restarts,
    RunningEngine,
)
from kvbaton.router.engine_info import Role

log = logging.getLogger(__name__)


class ManagerLost(RuntimeError):
    """The manager is dead, and Ray does not start it again; the message is fit for an operator."""


class PoolState(Generations, Protocol):
    """The part of the shared state that a manager needs; survives the manager."""

    def desired(self) -> AsyncIterator[PoolsConfig]:
        """The wanted pools: what is set now, then each change. Waits while the store is away."""
        ...


@dataclass(frozen=True, slots=True)
class PoolView:
    """All engines at one moment. `version` grows with each change."""

    version: int
    engines: tuple[EngineStatus, ...]
    desired: PoolsConfig | None

    @property
    def settled(self) -> bool:
        """Every wanted engine is up in its role, and there is no other."""
        if self.desired is None or not all(engine.ready for engine in self.engines):
            return False
        return plan_pools(self.engines, self.desired) == PoolPlan()


class PoolManager:
    """Owns one `EngineSupervisor` per engine id, from `start` to `stop`."""

    def __init__(self, factory: EngineFactory, state: PoolState, clock: Clock, backoff: Backoff | None = None) -> None:
        self._factory = factory
        self._state = state
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._supervisors: dict[str, EngineSupervisor] = {}
        self._desired: PoolsConfig | None = None
        self._version = 0
        self._changed = asyncio.Event()
        self._run_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to reconcile; returns at once."""
        self._run_task = asyncio.create_task(self._run(), name="pool-manager")

    async def stop(self) -> None:
        """End every engine; returns when none is left."""
        if self._run_task is not None:
            self._run_task.cancel()
            await asyncio.gather(self._run_task, return_exceptions=True)
        supervisors, self._supervisors = list(self._supervisors.values()), {}
        await asyncio.gather(*(supervisor.stop() for supervisor in supervisors))
        self._on_change()

    def view(self) -> PoolView:
        engines = tuple(supervisor.status for _, supervisor in sorted(self._supervisors.items()))
        return PoolView(self._version, engines, self._desired)

    async def changed(self, after: int) -> PoolView:
        """The view as soon as its version is above `after`."""
        while self._version <= after:
            await self._changed.wait()
        return self.view()

    async def _run(self) -> None:
        for engine in await self._factory.existing():  # those of a manager that died served on without it
            self._supervise(engine.info.engine_id, engine.info.role, engine)
        async for pools in self._state.desired():
            self._desired = pools
            self._on_change()
            await self._apply(plan_pools(self.view().engines, pools))

    async def _apply(self, plan: PoolPlan) -> None:
        log.info("pools: %d switches, %d starts, %d stops", len(plan.switches), len(plan.starts), len(plan.stops))
        await asyncio.gather(*(self._supervisors[item.engine_id].switch(item.role) for item in plan.switches))
        for engine_id, role in zip(free_ids(list(self._supervisors), len(plan.starts)), plan.starts, strict=True):
            self._supervise(engine_id, role)
        stopping = [self._supervisors.pop(engine_id) for engine_id in plan.stops]
        await asyncio.gather(*(supervisor.stop() for supervisor in stopping))
        self._on_change()

    def _supervise(self, engine_id: str, role: Role, adopted: RunningEngine | None = None) -> None:
        restarts = Restarts(self._clock, self._backoff)
        supervisor = EngineSupervisor(
            engine_id, role, self._factory, self._state, restarts, self._on_change, adopted=adopted
        )
        self._supervisors[engine_id] = supervisor
        supervisor.start()

    def _on_change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
