"""Finds engines that hang: alive to Ray, silent to the registry. While the store is away nobody counts as silent."""

from __future__ import annotations

import asyncio

from kvbaton.cluster.store.registry import Membership
from kvbaton.router.engine_info import EngineInfo


class HeartbeatWatch:
    """Follows a membership list, which the caller starts and closes."""

    def __init__(self, membership: Membership) -> None:
        self._present: frozenset[tuple[str, int]] = frozenset()
        self._changed = asyncio.Event()
        membership.subscribe(self._list)

    async def silent(self, engine_id: str, generation: int) -> None:
        """Returns when this incarnation, once listed, is listed no more."""
        key = (engine_id, generation)
        while key not in self._present:
            await self._changed.wait()
        while key in self._present:
            await self._changed.wait()

    def _list(self, engines: tuple[EngineInfo, ...]) -> None:
        self._present = frozenset((info.engine_id, info.generation) for info in engines)
        self._changed.set()
        self._changed = asyncio.Event()
