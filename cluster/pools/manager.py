"""`PoolManager`: makes the engines that exist equal to the pools that are wanted. Plain asyncio, no Ray.

    desired pools (store) ──> plan ──> switch roles, start, stop
    engines ──die──> their keeper replaces them under a new generation, on its own

It is never on the request path: ingresses find engines in the registry, and go on without a manager.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools.plan import Plan, Slot, free_ids, plan_pools
from kvbaton.cluster.pools.supervisor import (
    Backoff,
    Clock,
    EngineFactory,
    EngineFailed,
    EngineKeeper,
    EngineView,
    KeeperTools,
)
from kvbaton.router.engine_info import EngineState, Role

log = logging.getLogger(__name__)


class PoolState(Protocol):
    """The part of the shared state that a manager needs; survives the manager."""

    async def next_generation(self, engine_id: str) -> int:
        """A number higher than any given out for this id before. Raises `StateUnavailable`."""
        ...

    def desired(self) -> AsyncIterator[PoolsConfig]:
        """The wanted pools: what is set now, then each change. Waits while the store is away."""
        ...


class StateUnavailable(EngineFailed):
    """The shared state cannot be reached; what depends on it is tried again later."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """All engines at one moment. `version` grows with each change."""

    version: int
    engines: tuple[EngineView, ...]
    desired: PoolsConfig | None

    @property
    def settled(self) -> bool:
        """Every wanted engine is up in its role, and no other."""
        if self.desired is None or any(engine.state is not EngineState.READY for engine in self.engines):
            return False
        return plan_pools([Slot(e.engine_id, e.role, True) for e in self.engines], self.desired) == Plan()


class PoolManager:
    """Owns one `EngineKeeper` per engine id. `run` until `stop`."""

    def __init__(self, factory: EngineFactory, state: PoolState, clock: Clock, backoff: Backoff | None = None) -> None:
        self._state = state
        self._tools = KeeperTools(factory, state.next_generation, clock, backoff or Backoff(), self._on_change)
        self._keepers: dict[str, EngineKeeper] = {}
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
        keepers, self._keepers = list(self._keepers.values()), {}
        await asyncio.gather(*(keeper.stop() for keeper in keepers))
        self._on_change()

    def view(self) -> PoolView:
        engines = tuple(keeper.view() for _, keeper in sorted(self._keepers.items()))
        return PoolView(self._version, engines, self._desired)

    async def changed(self, after: int) -> PoolView:
        """The view as soon as its version is above `after`."""
        while self._version <= after:
            await self._changed.wait()
        return self.view()

    async def _run(self) -> None:
        await self._adopt()
        async for pools in self._state.desired():
            self._desired = pools
            self._on_change()
            await self._apply(plan_pools(self._slots(), pools))

    async def _adopt(self) -> None:
        """Take over the engines of a manager that died: they served on without it."""
        for engine in await self._tools.factory.existing():
            engine_id, role = engine.info.engine_id, engine.info.role
            self._keepers[engine_id] = EngineKeeper(engine_id, role, self._tools, adopted=engine)
            self._keepers[engine_id].start()

    def _slots(self) -> list[Slot]:
        return [Slot(keeper.engine_id, keeper.role, keeper.ready) for keeper in self._keepers.values()]

    async def _apply(self, plan: Plan) -> None:
        log.info("pools: %d switches, %d starts, %d stops", len(plan.switches), len(plan.starts), len(plan.stops))
        await asyncio.gather(*(self._keepers[item.engine_id].switch(item.role) for item in plan.switches))
        self._start_engines(plan.starts)
        stopping = [self._keepers.pop(engine_id) for engine_id in plan.stops]
        await asyncio.gather(*(keeper.stop() for keeper in stopping))
        self._on_change()

    def _start_engines(self, roles: tuple[Role, ...]) -> None:
        for engine_id, role in zip(free_ids(list(self._keepers), len(roles)), roles, strict=True):
            keeper = EngineKeeper(engine_id, role, self._tools)
            self._keepers[engine_id] = keeper
            keeper.start()

    def _on_change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
