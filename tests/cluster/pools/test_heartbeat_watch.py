"""An engine that falls silent is noticed, and one that was not heard yet is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from kvbaton.cluster.pools.heartbeat_watch import HeartbeatWatch
from kvbaton.cluster.store.registry import ENGINES, Membership, encode_entry
from kvbaton.cluster.store.store import MemoryStore
from support.pool_support import settle
from support.session_support import make_info


class Registry:
    """A store with hand-written beats, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryStore(lambda: self.now)
        self.membership = Membership(self.store, lambda: self.now, ttl_s=3.0)
        self.watch = HeartbeatWatch(self.membership)
        self._beats = 0

    async def beat(self, engine_id: str, generation: int = 1) -> None:
        self._beats += 1
        info = replace(make_info(), engine_id=engine_id, generation=generation)
        await self.store.put(f"{ENGINES}{engine_id}/{generation}", encode_entry(info, self._beats), 100.0)

    async def look(self, after_s: float = 0.0) -> None:
        self.now += after_s
        await self.membership.look()
        await settle()

    async def silence(self) -> None:
        """More than the life span, looked at as often as a watcher does."""
        for _ in range(10):
            await self.look(0.5)


async def test_silence_of_one_is_noticed_while_the_other_beats() -> None:
    registry = Registry()
    await registry.beat("a")
    await registry.beat("b")
    await registry.look()
    a, b = (asyncio.create_task(registry.watch.silent(name, 1)) for name in "ab")
    for _ in range(4):
        await registry.beat("b")
        await registry.look(1.0)
    assert (a.done(), b.done()) == (True, False)
    b.cancel()


async def test_an_engine_not_heard_yet_is_not_silent() -> None:
    """Guards a start-up: the manager knows of an engine before its first beat is read."""
    registry = Registry()
    waiting = asyncio.create_task(registry.watch.silent("a", 2))
    await registry.beat("a", generation=1)
    await registry.look()
    await registry.silence()
    assert not waiting.done()
    await registry.beat("a", generation=2)
    await registry.look()
    assert not waiting.done()
    await registry.silence()
    assert waiting.done()
