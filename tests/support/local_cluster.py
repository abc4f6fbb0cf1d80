"""Engines in processes of their own and the real cluster client in this one: everything but Ray, HTTP and the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import TracebackType

from kvbaton.cluster.client.client import ClientConfig, ClusterClient
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.router.engine_info import EngineInfo, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.engine_process import SECRET, EngineOptions, EngineProcess, host_spec


class StaticMembership:
    """Stands for `Membership` where there is no store: the list changes when the test says so."""

    def __init__(self) -> None:
        self.engines: tuple[EngineInfo, ...] = ()
        self._listeners: list[Callable[[tuple[EngineInfo, ...]], None]] = []

    def subscribe(self, listener: Callable[[tuple[EngineInfo, ...]], None]) -> None:
        self._listeners.append(listener)
        listener(self.engines)

    def set(self, engines: tuple[EngineInfo, ...]) -> None:
        self.engines = engines
        for listener in self._listeners:
            listener(engines)


class LocalCluster:
    """`async with LocalCluster(model, roles) as cluster:` then `cluster.client.generate(...)`."""

    def __init__(
        self,
        model: Path,
        roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE),
        options: EngineOptions | None = None,
        config: ClientConfig | None = None,
        local_prefill_max_tokens: int = 0,
        special: dict[str, EngineOptions] | None = None,
    ) -> None:
        """`special` gives single engines, by name, options of their own."""
        self._model = model
        self._options = options or EngineOptions()
        self._special = special or {}
        self._roles = roles
        self.engines: dict[str, EngineProcess] = {}
        self.membership = StaticMembership()
        self.router = Router(RouterConfig(local_prefill_max_tokens), time.monotonic, Random(0))
        self.client = ClusterClient(self.membership, self.router, SECRET, "test-ingress", config)  # type: ignore[arg-type]

    async def __aenter__(self) -> LocalCluster:
        names = [f"{role.value}-{i}" for i, role in enumerate(self._roles)]
        for name, role in zip(names, self._roles, strict=True):
            self.engines[name] = EngineProcess(
                host_spec(name, role, self._model, self._special.get(name, self._options))
            )
        infos = await asyncio.gather(*(asyncio.to_thread(engine.start) for engine in self.engines.values()))
        self.membership.set(tuple(infos))
        await self.client.start()
        await self.until(lambda: len(self.router.engines) == len(self.engines), "every engine is connected")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in self.engines.values()))

    async def replace(self, name: str) -> EngineInfo:
        """Start the next generation of an engine that was killed, and list it."""
        old = self.engines[name].spec
        spec = host_spec(name, old.role, self._model, self._options, old.generation + 1)
        self.engines[name] = EngineProcess(spec)
        info = await asyncio.to_thread(self.engines[name].start)
        others = tuple(item for item in self.membership.engines if item.engine_id != name)
        self.membership.set((*others, info))
        return info

    async def tokens(self, request: Request) -> dict[int, list[int]]:
        """Every sample's tokens, read to the end."""
        found: dict[int, list[int]] = {sample: [] for sample in request.sample_indices}
        for output in await self.outputs(request):
            if output.token_id is not None:
                found[output.sample].append(output.token_id)
        return found

    async def outputs(self, request: Request) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        async for batch in self.client.generate(request):
            outputs += batch
        ends = [output.finish for output in outputs if output.finish is not None]
        assert len(ends) == len(request.sample_indices)
        assert set(ends) <= {FinishReason.STOP, FinishReason.LENGTH}
        return outputs

    async def assert_clean(self, within_s: float = 5.0) -> None:
        """Every live engine holds nothing: no block, no hand-off, no request."""
        deadline = time.monotonic() + within_s
        while True:
            stats = [await asyncio.to_thread(engine.stats) for engine in self.engines.values()]
            busy = [s for s in stats if s.load.held_blocks or s.requests or s.transfer.sending or s.transfer.receiving]
            if not busy:
                break
            assert time.monotonic() < deadline, f"still held: {busy}"
            await asyncio.sleep(0.02)
        for s in stats:
            assert s.transfer.quarantined_blocks == 0
            assert s.load.free_blocks + s.load.held_blocks + s.load.cached_blocks == s.info.num_blocks
        for name, engine in self.engines.items():
            audit = await asyncio.to_thread(engine.audit)
            assert audit.problems == (), name
            assert (audit.held, audit.free + audit.cache) == (0, audit.total), name

    async def until(self, holds: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
            await asyncio.sleep(0.01)
