"""A hand-moved clock and engines that do what the test says, for `EngineSupervisor` and `PoolManager`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools.supervisor import EngineFailed, EngineSpec, StateUnavailable
from kvbaton.router.engine_info import EngineInfo, EngineState, Role


class HandClock:
    """Time stands still until `advance`."""

    def __init__(self) -> None:
        self._now = 100.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    @property
    def sleeping_for(self) -> list[float]:
        """How long each pending sleep still has to go."""
        return [due - self._now for due, future in self._sleepers if not future.done()]

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + seconds, future))
        await future

    async def advance(self, seconds: float) -> None:
        self._now += seconds
        due = [item for item in self._sleepers if item[0] <= self._now]
        self._sleepers = [item for item in self._sleepers if item[0] > self._now]
        for _, future in due:
            if not future.done():
                future.set_result(None)
        await settle()


async def settle() -> None:
    """Let every task run until all of them wait for something that only the test can bring."""
    for _ in range(50):
        await asyncio.sleep(0)


class ScriptedEngine:
    """An engine whose death the test decides."""

    def __init__(self, spec: EngineSpec, book: list[str]) -> None:
        self.spec = spec
        self.role = spec.role
        self.switch_fails: str | None = None
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._book = book

    @property
    def name(self) -> str:
        return f"{self.spec.engine_id}/{self.spec.generation}"

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            engine_id=self.spec.engine_id,
            generation=self.spec.generation,
            role=self.role,
            state=EngineState.READY,
            host="127.0.0.1",
            session_port=1,
            kv_port=2,
            model_id="m",
            max_model_len=64,
            block_size=16,
            num_blocks=8,
            prefill_chunk_tokens=512,
            max_requests=64,
        )

    async def set_role(self, role: Role) -> None:
        if self.switch_fails is not None:
            raise EngineFailed(self.switch_fails)
        self.role = role
        self._book.append(f"switch {self.name} {role}")

    async def died(self) -> str:
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        if not self._death.done():
            self._book.append(f"stop {self.name}")
            self._death.set_result("stopped")

    def die(self, reason: str) -> None:
        self._book.append(f"die {self.name}")
        self._death.set_result(reason)


class ScriptedFactory:
    """`book` tells what happened, in order. Set `hold` to keep starts pending, `fail` to make them fail."""

    def __init__(self) -> None:
        self.book: list[str] = []
        self.engines: dict[str, ScriptedEngine] = {}
        self.fail: Callable[[EngineSpec], str | None] = lambda spec: None
        self.hold: asyncio.Event | None = None

    async def existing(self) -> list[ScriptedEngine]:
        return list(self.engines.values())

    async def start(self, spec: EngineSpec) -> ScriptedEngine:
        self.book.append(f"start {spec.engine_id}/{spec.generation} {spec.role}")
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.book.append(f"abandon {spec.engine_id}/{spec.generation}")
            raise
        if (reason := self.fail(spec)) is not None:
            raise EngineFailed(reason)
        engine = ScriptedEngine(spec, self.book)
        self.engines[spec.engine_id] = engine
        return engine


@dataclass
class ScriptedState:
    """Desired pools that the test sets; generations that count up from `base`."""

    base: int = 0
    away: bool = False
    _given: dict[str, int] = field(default_factory=dict)
    _queue: asyncio.Queue[PoolsConfig] = field(default_factory=asyncio.Queue)

    async def next_generation(self, engine_id: str) -> int:
        if self.away:
            raise StateUnavailable("redis://x: connection refused")
        self._given[engine_id] = self._given.get(engine_id, self.base) + 1
        return self._given[engine_id]

    def forget(self) -> None:
        """As a server without persistence that was started anew."""
        self._given.clear()

    def want(self, prefill: int, decode: int, hybrid: int = 0) -> None:
        self._queue.put_nowait(PoolsConfig(prefill, decode, hybrid))

    async def desired(self) -> AsyncIterator[PoolsConfig]:
        while True:
            yield await self._queue.get()
