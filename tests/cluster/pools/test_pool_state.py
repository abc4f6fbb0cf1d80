"""Desired pools and generations in the store."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools import state as pool_state
from kvbaton.cluster.pools.state import CHANGES, DESIRED, StorePoolState, read_desired, write_desired
from kvbaton.cluster.store.store import MemoryStore
from support.client_support import eventually


async def test_what_is_written_is_read() -> None:
    store = MemoryStore()
    assert await read_desired(store) is None
    await write_desired(store, PoolsConfig(2, 3, 1))
    assert await read_desired(store) == PoolsConfig(2, 3, 1)


async def test_generations_grow_per_engine() -> None:
    state = StorePoolState(MemoryStore())
    assert [await state.next_generation(name) for name in ("a", "a", "b", "a")] == [1, 2, 1, 3]


async def test_a_store_that_was_emptied_gets_the_wanted_pools_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the manager's successor, who would find no word of what is wanted."""
    monkeypatch.setattr(pool_state, "MAX_WAIT_S", 0.01)
    store = MemoryStore()
    heard: list[PoolsConfig] = []

    async def listen() -> None:
        async for pools in StorePoolState(store).desired():
            heard.append(pools)

    await write_desired(store, PoolsConfig(3, 2))
    listener = asyncio.create_task(listen())
    await eventually(lambda: len(heard) == 1)
    await store.close()
    async with asyncio.timeout(10):
        while await read_desired(store) is None:  # noqa: ASYNC110 (the store has nobody to tell)
            await asyncio.sleep(0.005)
    assert await read_desired(store) == PoolsConfig(3, 2)
    await write_desired(store, PoolsConfig(1, 1))
    await eventually(lambda: len(heard) > 1)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    assert heard == [PoolsConfig(3, 2), PoolsConfig(1, 1)]


async def test_changes_are_heard_and_nonsense_is_passed_over() -> None:
    """Guards the manager's loop: a hand-edited value must not end it, and equal values must not wake it."""
    store = MemoryStore()
    heard: list[PoolsConfig] = []
    arrived = asyncio.Event()

    async def listen() -> None:
        async for pools in StorePoolState(store).desired():
            heard.append(pools)
            arrived.set()

    async def next_heard() -> PoolsConfig:
        await asyncio.wait_for(arrived.wait(), 5)
        arrived.clear()
        return heard[-1]

    listener = asyncio.create_task(listen())
    await write_desired(store, PoolsConfig(1, 1))
    assert await next_heard() == PoolsConfig(1, 1)
    await write_desired(store, PoolsConfig(1, 1))
    await store.put(DESIRED, b'{"prefil": 2}')
    await store.append(CHANGES, b"", 16)
    await write_desired(store, PoolsConfig(2, 1))
    assert await next_heard() == PoolsConfig(2, 1)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    assert heard == [PoolsConfig(1, 1), PoolsConfig(2, 1)]
