"""Cancelled calls, from the ingress replica that was told to the one that has the call: one stream in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvbaton.cluster.store.store import Cursor, Store, StoreUnavailable, end_task

log = logging.getLogger(__name__)

STREAM = "cancelled"
_MAX_EVENTS = 4096
_TTL_S = 3600.0
_WAIT_S = 1.0
_PAUSE_S = 1.0


class CancelFeed:
    """`cancel` is called with each id that any replica was told, this one included."""

    def __init__(self, store: Store, cancel: Callable[[str], object]) -> None:
        self._store = store
        self._cancel = cancel
        self._after = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="cancelled-calls")

    async def close(self) -> None:
        await end_task(self._task)

    async def tell(self, call_id: str) -> bool:
        """False where the store does not take it."""
        try:
            await self._store.append(STREAM, call_id.encode(), _MAX_EVENTS, _TTL_S)
        except StoreUnavailable as error:
            log.warning("cancelled calls: %s", error)
            return False
        return True

    async def _follow(self) -> None:
        while True:
            try:
                events = await self._store.read([Cursor(STREAM, self._after)], _MAX_EVENTS, _WAIT_S)
            except StoreUnavailable as error:
                log.debug("cancelled calls: %s", error)
                self._after = 0  # the store may come back empty; an id that is told twice does no harm
                await asyncio.sleep(_PAUSE_S)
                continue
            for event in events:
                self._after = event.number
                self._cancel(event.value.decode(errors="replace"))
