"""Desired pools and generations in the store."""

from __future__ import annotations

import asyncio

from kvbaton.cluster.config import PoolSettings
from kvbaton.cluster.pool_state import CHANGES, DESIRED, StorePoolState, read_desired, write_desired
from kvbaton.cluster.store import MemoryStore


async def test_what_is_written_is_read() -> None:
    store = MemoryStore()
    assert await read_desired(store) is None
    await write_desired(store, PoolSettings(2, 3, 1))
    assert await read_desired(store) == PoolSettings(2, 3, 1)


async def test_generations_grow_per_engine() -> None:
    state = StorePoolState(MemoryStore())
    assert [await state.next_generation(name) for name in ("a", "a", "b", "a")] == [1, 2, 1, 3]


async def test_changes_are_heard_and_nonsense_is_passed_over() -> None:
    """Guards the manager's loop: a hand-edited value must not end it, and equal values must not wake it."""
    store = MemoryStore()
    heard: list[PoolSettings] = []
    arrived = asyncio.Event()

    async def listen() -> None:
        async for pools in StorePoolState(store).desired():
            heard.append(pools)
            arrived.set()

    async def next_heard() -> PoolSettings:
        await asyncio.wait_for(arrived.wait(), 5)
        arrived.clear()
        return heard[-1]

    listener = asyncio.create_task(listen())
    await write_desired(store, PoolSettings(1, 1))
    assert await next_heard() == PoolSettings(1, 1)
    await write_desired(store, PoolSettings(1, 1))
    await store.put(DESIRED, b'{"prefil": 2}')
    await store.append(CHANGES, b"", 16)
    await write_desired(store, PoolSettings(2, 1))
    assert await next_heard() == PoolSettings(2, 1)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    assert heard == [PoolSettings(1, 1), PoolSettings(2, 1)]
