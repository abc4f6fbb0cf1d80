"""Engine processes that register in a real store, and a cluster client that follows the real membership list.

What `LocalCluster` leaves out is here: heartbeats that stop, engines replaced under their name, an ingress in a process
of its own. Only Ray and HTTP are missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

from kvbaton.cluster.client.client import ClientConfig, ClusterClient
from kvbaton.cluster.host.engine_host import EngineStats
from kvbaton.cluster.store.prefix_feed import PrefixFollower
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.registry import Membership
from kvbaton.cluster.store.valkey import EmbeddedValkey
from kvbaton.engine.request import Request
from kvbaton.router.engine_info import EngineState, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.engine_process import SECRET, EngineOptions, EngineProcess, host_spec
from support.external_valkey import ExternalValkey


class Stream:
    """One request being read: its tokens with the times of their arrival, and how it ended."""

    def __init__(self, client: ClusterClient, request: Request) -> None:
        self.request = request
        self.tokens: dict[int, list[int]] = {sample: [] for sample in request.sample_indices}
        self.times: list[float] = []
        self.error: Exception | None = None
        self._client = client
        self._task = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        return self._task.done()

    def leave(self) -> None:
        """As a client that disconnects."""
        self._task.cancel()

    async def end(self, within_s: float = 30.0) -> dict[int, list[int]]:
        """Its tokens, when it is over. Raises what the stream raised."""
        done, _ = await asyncio.wait([self._task], timeout=within_s)
        assert done, f"{self.request.request_id} is not over within {within_s} s: {self.times[-1:]}"
        if self.error is not None:
            raise self.error
        return self.tokens

    async def _read(self) -> None:
        outputs = self._client.generate(self.request)
        try:
            async for batch in outputs:
                for output in batch:
                    if output.token_id is not None:
                        self.tokens[output.sample].append(output.token_id)
                        self.times.append(time.monotonic())
        except Exception as error:
            self.error = error
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]


class LiveCluster:
    """`start`, use `client` and `engines`, `stop`. Engines are named after their role and place: prefill-0."""

    def __init__(
        self,
        model: Path,
        options: dict[Role, EngineOptions],
        counts: dict[Role, int],
        config: ClientConfig | None = None,
        router: RouterConfig | None = None,
        valkey: EmbeddedValkey | ExternalValkey | None = None,
    ) -> None:
        self.engines: dict[str, EngineProcess] = {}
        self.url = ""
        self._model = model
        self._options = options
        self._counts = counts
        self._config = config or ClientConfig()
        self._router_config = router or RouterConfig()
        self._valkey = valkey or EmbeddedValkey()

    async def start(self) -> None:
        self.url = self._valkey.start()
        for role, count in self._counts.items():
            for i in range(count):
                self._launch(f"{role.value}-{i}", role, 1)
        await asyncio.gather(*(asyncio.to_thread(engine.start) for engine in self.engines.values()))
        self.store = await RedisStore.open(self.url)
        self.membership = Membership(self.store)
        await self.membership.start()
        self.router = Router(self._router_config, time.monotonic, Random(0))
        self.client = ClusterClient(self.membership, self.router, SECRET, "test-ingress", self._config)
        await self.client.start()
        self.prefixes = PrefixFollower(self.store, self.router.index)
        self.membership.subscribe(self.prefixes.follow)
        self.prefixes.start()
        await self.until_connected()

    async def stop(self) -> None:
        await self.client.close()
        await self.prefixes.close()
        await self.membership.close()
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in self.engines.values()))
        await self.store.close()
        self._valkey.stop()

    def stream(self, request: Request) -> Stream:
        return Stream(self.client, request)

    def launch(self, name: str) -> None:
        """Begin to start the next generation of an engine that has ended."""
        old = self.engines[name].spec
        self._launch(name, old.role, old.generation + 1)

    async def replace(self, name: str) -> None:
        self.launch(name)
        await asyncio.to_thread(self.engines[name].start)

    async def until_connected(self) -> None:
        """This client has a session to the newest generation of each engine, and each takes requests."""

        def connected() -> bool:
            ready = [info for info in self.router.engines if info.state is EngineState.READY]
            found = {info.engine_id: info.generation for info in ready}
            return found == {name: engine.spec.generation for name, engine in self.engines.items()}

        await until(connected, "every engine is connected")

    async def stats(self, name: str) -> EngineStats:
        return await asyncio.to_thread(self.engines[name].stats)

    async def seconds_until_free(self, limit_s: float, names: tuple[str, ...] = ()) -> float:
        """How long it takes until these engines (all) hold no block, hand-off or request; fails past the limit."""
        started = time.monotonic()
        while True:
            all_stats = [await self.stats(name) for name in names or self.engines]
            busy = [s for s in all_stats if _holds(s)]
            took_s = time.monotonic() - started
            if not busy:
                break
            assert took_s < limit_s, f"still held after {took_s:.1f} s: {busy}"
            await asyncio.sleep(0.01)
        for s in all_stats:
            assert s.load.free_blocks + s.load.cached_blocks == s.info.num_blocks, s
        return took_s

    def _launch(self, name: str, role: Role, generation: int) -> None:
        spec = host_spec(name, role, self._model, self._options[role], generation)
        self.engines[name] = EngineProcess(spec, self.url)


def _holds(stats: EngineStats) -> bool:
    transfer = stats.transfer
    return bool(stats.load.held_blocks or stats.requests or transfer.sending or transfer.receiving) or bool(
        transfer.quarantined_blocks
    )


async def until(holds: Callable[[], bool], what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


async def until_told(asked: Callable[[], Awaitable[bool]], what: str, within_s: float = 30.0) -> None:
    """As `until`, for an answer that has to be fetched."""
    deadline = time.monotonic() + within_s
    while not await asked():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)
