"""The store in Redis (or Valkey): what the processes of a cluster share.

Keys live under one namespace, so that several clusters can share a server. A call fails fast with `StoreUnavailable`;
the next one tries to connect again by itself, and waiting between tries is the caller's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from kvbaton.cluster.store.store import (
    MAX_WAIT_S,
    Cursor,
    Entry,
    StoreUnavailable,
    StreamEvent,
    check_cursors,
    redacted,
)

_CONNECT_TIMEOUT_S = 2.0
_REPLY_TIMEOUT_S = MAX_WAIT_S + 2.0
_SCAN_COUNT = 1000

# Numbering, adding and trimming in one step, so that numbers have no gap however many append. The counter is a second
# key beside the stream and shares its life span.
_APPEND = """
local number = redis.call('INCR', KEYS[2])
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], number .. '-0', 'v', ARGV[1])
if ARGV[3] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
return number
"""


class RedisStore:
    """A `Store` behind a URL such as redis://:password@host:6379/0. Make it with `open`."""

    def __init__(self, url: str, namespace: str) -> None:
        self.name = redacted(url)
        self._prefix = f"{namespace}:"
        # RESP2 keeps one reply shape over all server versions; one retry at once covers a connection gone stale.
        self._redis: Any = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_REPLY_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )

    @classmethod
    async def open(cls, url: str, namespace: str = "kvbaton") -> RedisStore:
        """Connect and check that the server answers. Raises `StoreUnavailable`, also for a URL that is none."""
        try:
            store = cls(url, namespace)
        except ValueError as error:
            raise StoreUnavailable(f"{redacted(url)!r} is not a Redis URL: {error}") from None
        try:
            await store.ping()
        except StoreUnavailable:
            await store.close()
            raise
        return store

    async def ping(self) -> None:
        async with self._translated():
            await self._redis.ping()

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        async with self._translated():
            await self._redis.set(self._prefix + key, value, px=_milliseconds(ttl_s))

    async def get(self, key: str) -> bytes | None:
        async with self._translated():
            value: bytes | None = await self._redis.get(self._prefix + key)
        return value

    async def delete(self, key: str) -> None:
        async with self._translated():
            await self._redis.delete(self._prefix + key, self._counter(key))

    async def entries(self, prefix: str) -> list[Entry]:
        pattern = "".join(f"\\{char}" if char in "*?[]\\" else char for char in self._prefix + prefix) + "*"
        async with self._translated():
            keys = sorted({key async for key in self._redis.scan_iter(match=pattern, count=_SCAN_COUNT)})
            values = await self._redis.mget(keys) if keys else []
        start = len(self._prefix)
        found = zip(keys, values, strict=True)
        return [Entry(key.decode()[start:], value) for key, value in found if value is not None]

    async def increment(self, key: str) -> int:
        async with self._translated():
            return int(await self._redis.incr(self._prefix + key))

    async def append(self, stream: str, value: bytes, max_events: int, ttl_s: float | None = None) -> int:
        keys = (self._prefix + stream, self._counter(stream))
        async with self._translated():
            return int(await self._redis.eval(_APPEND, 2, *keys, value, max_events, _milliseconds(ttl_s) or ""))

    async def read(self, cursors: Sequence[Cursor], limit: int, wait_s: float = 0.0) -> list[StreamEvent]:
        if not cursors:
            return []
        positions = {self._prefix + cursor.stream: f"{cursor.after}-0" for cursor in cursors}
        block = _milliseconds(min(wait_s, MAX_WAIT_S)) if wait_s > 0 else None
        async with self._translated():
            reply = await self._redis.xread(positions, count=limit, block=block)
            if not reply:
                counts = await self._redis.mget([self._counter(cursor.stream) for cursor in cursors])
                check_cursors(cursors, [int(count or 0) for count in counts])
        return [event for name, events in reply for event in self._events(name, events)]

    async def close(self) -> None:
        await self._redis.aclose()

    def _events(self, name: bytes, events: list[Any]) -> list[StreamEvent]:
        stream = name.decode()[len(self._prefix) :]
        return [StreamEvent(stream, int(event_id.partition(b"-")[0]), fields[b"v"]) for event_id, fields in events]

    def _counter(self, stream: str) -> str:
        return f"{self._prefix}#{stream}"

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except StoreUnavailable:
            raise
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"Redis at {self.name}: {error or type(error).__name__}") from error


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))
