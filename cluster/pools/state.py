"""Desired pools and engine generations in the store: what a manager reads and an operator's command writes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.config.config_file import build
from kvbaton.cluster.pools.supervisor import StateUnavailable
from kvbaton.cluster.store.store import MAX_WAIT_S, Cursor, Store, StoreUnavailable
from kvbaton.settings import ConfigError

log = logging.getLogger(__name__)

DESIRED = "pools/desired"
CHANGES = "pool-changes"  # stream: an event for each write of DESIRED
GENERATIONS = "generations/"
_RETRY_S = 1.0
_MAX_CHANGES = 16


async def write_desired(store: Store, pools: PoolsConfig) -> None:
    """Set the wanted pools; the manager hears of it. Raises `StoreUnavailable`."""
    await store.put(DESIRED, json.dumps(asdict(pools)).encode())
    await store.append(CHANGES, b"", _MAX_CHANGES)


async def read_desired(store: Store) -> PoolsConfig | None:
    """The wanted pools, None where nobody set any. Raises `StoreUnavailable` and `ConfigError`."""
    value = await store.get(DESIRED)
    if value is None:
        return None
    try:
        tree = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{DESIRED} in the store is not JSON: {error}") from None
    return build({"pools": tree}).pools


class StorePoolState:
    """`manager.PoolState` on a `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def next_generation(self, engine_id: str) -> int:
        try:
            return await self._store.increment(f"{GENERATIONS}{engine_id}")
        except StoreUnavailable as error:
            raise StateUnavailable(str(error)) from error

    async def desired(self) -> AsyncIterator[PoolsConfig]:
        """Yields what is set, then each change. An outage is waited out; a value that makes no sense is passed over."""
        last: PoolsConfig | None = None
        after = 0
        while True:
            try:
                pools = await self._readable()
                if pools is None and last is not None and await self._store.get(DESIRED) is None:
                    await write_desired(self._store, last)  # it has lost its data; the next manager needs them
                if pools is not None and pools != last:
                    last = pools
                    yield pools
                changes = await self._store.read([Cursor(CHANGES, after)], _MAX_CHANGES, MAX_WAIT_S)
                after = changes[-1].number if changes else after
            except StoreUnavailable as error:
                log.warning("desired pools: %s", error)
                after = 0  # a store that lost its data counts from 1 again
                await asyncio.sleep(_RETRY_S)

    async def _readable(self) -> PoolsConfig | None:
        try:
            return await read_desired(self._store)
        except ConfigError as error:
            log.warning("desired pools passed over: %s", error)
            return None
