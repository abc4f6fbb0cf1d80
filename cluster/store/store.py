"""Where engines, ingresses and the manager leave word for each other: values with a life span, and numbered streams.

Two implementations with the same meaning: `RedisStore` (`redis_store`) between processes, `MemoryStore` in one. Keys
are plain strings with `/`; values are bytes. A stream numbers its events 1, 2, 3 ... without a gap, whoever appends,
and keeps the newest `max_events`: a reader whose next number is missing knows that it was too slow.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

MAX_WAIT_S = 2.0  # one blocking read; longer waits are the caller's loop
_CANCEL_AGAIN_S = 0.2


class StoreUnavailable(ConnectionError):
    """The store cannot be reached at present, or refuses; the message names it, without its password."""


class StreamReset(StoreUnavailable):
    """A stream ends before a reader's cursor: the store was emptied, or another took its place. Read from 0 again."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the store of a cluster is; the URL may hold a password."""

    url: str = field(repr=False)
    namespace: str


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a reader of a stream stands: `after` is the number of the last event it knows, 0 at first."""

    stream: str
    after: int


@dataclass(frozen=True, slots=True)
class StreamEvent:
    stream: str
    number: int
    value: bytes


class Store(Protocol):
    """Every method may raise `StoreUnavailable`; whether a write then took place is unknown."""

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Set a value, for `ttl_s` seconds from now or for good; an earlier life span is replaced."""
        ...

    async def get(self, key: str) -> bytes | None: ...

    async def delete(self, key: str) -> None:
        """Remove a value or a whole stream; a stream that is deleted starts again at 1."""
        ...

    async def entries(self, prefix: str) -> list[Entry]:
        """All values whose key starts with `prefix`, by key. Streams and counters have no place under such a prefix."""
        ...

    async def increment(self, key: str) -> int:
        """Increase a counter by one, from 0; returns the new number, which nobody else gets."""
        ...

    async def append(self, stream: str, value: bytes, max_events: int, ttl_s: float | None = None) -> int:
        """Add an event; returns its number. With `ttl_s` the stream vanishes if nothing is added for so long."""
        ...

    async def read(self, cursors: Sequence[Cursor], limit: int, wait_s: float = 0.0) -> list[StreamEvent]:
        """Events past the cursors, at most `limit` of each stream, in order within it. Where there are none, wait for
        the first for up to `wait_s` (at most MAX_WAIT_S), then return what there is, maybe nothing. Where there is
        nothing, a cursor past the end of its stream raises `StreamReset`."""
        ...

    async def close(self) -> None: ...


def check_cursors(cursors: Sequence[Cursor], last: Sequence[int]) -> None:
    """Raise `StreamReset` where a stream's last number, 0 for one that is not there, is below its cursor."""
    lost = [cursor.stream for cursor, number in zip(cursors, last, strict=True) if number < cursor.after]
    if lost:
        raise StreamReset(f"the store has lost {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}")


async def end_task(task: asyncio.Task[None] | None) -> None:
    """End a task that talks to the store. Cancels until it is done: a client library in between may swallow a
    cancellation that arrives together with a reply. Without a task there is nothing to end."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)


def redacted(url: str) -> str:
    """The URL without user name, password and query: fit for logs and error messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(slots=True)
class _Value:
    value: bytes
    expires_at: float | None


@dataclass(slots=True)
class _Stream:
    last: int = 0
    events: deque[StreamEvent] = field(default_factory=deque)
    expires_at: float | None = None


class MemoryStore:
    """The store of a cluster that lives in one process and event loop. `clock` decides when values expire."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, _Value] = {}
        self._streams: dict[str, _Stream] = {}
        self._appended = asyncio.Event()

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        self._values[key] = _Value(value, self._expiry(ttl_s))

    async def get(self, key: str) -> bytes | None:
        self._expire()
        held = self._values.get(key)
        return None if held is None else held.value

    async def delete(self, key: str) -> None:
        self._values.pop(key, None)
        self._streams.pop(key, None)

    async def entries(self, prefix: str) -> list[Entry]:
        self._expire()
        return [Entry(key, held.value) for key, held in sorted(self._values.items()) if key.startswith(prefix)]

    async def increment(self, key: str) -> int:
        count = int(await self.get(key) or b"0") + 1
        self._values[key] = _Value(b"%d" % count, None)
        return count

    async def append(self, stream: str, value: bytes, max_events: int, ttl_s: float | None = None) -> int:
        self._expire()
        held = self._streams.setdefault(stream, _Stream())
        held.last += 1
        held.events.append(StreamEvent(stream, held.last, value))
        while len(held.events) > max_events:
            held.events.popleft()
        held.expires_at = self._expiry(ttl_s)
        self._appended.set()
        self._appended = asyncio.Event()
        return held.last

    async def read(self, cursors: Sequence[Cursor], limit: int, wait_s: float = 0.0) -> list[StreamEvent]:
        found = self._past(cursors, limit)
        if found:
            return found
        if wait_s <= 0:
            return self._nothing(cursors)
        deadline = asyncio.get_running_loop().time() + min(wait_s, MAX_WAIT_S)
        try:
            async with asyncio.timeout_at(deadline):
                while not found:
                    await self._appended.wait()
                    found = self._past(cursors, limit)
        except TimeoutError:
            return self._nothing(cursors)
        return found

    async def close(self) -> None:
        self._values.clear()
        self._streams.clear()

    def _past(self, cursors: Sequence[Cursor], limit: int) -> list[StreamEvent]:
        self._expire()
        found: list[StreamEvent] = []
        for cursor in cursors:
            events = self._streams.get(cursor.stream, _Stream()).events
            found += [event for event in events if event.number > cursor.after][:limit]
        return found

    def _nothing(self, cursors: Sequence[Cursor]) -> list[StreamEvent]:
        check_cursors(cursors, [self._streams.get(cursor.stream, _Stream()).last for cursor in cursors])
        return []

    def _expiry(self, ttl_s: float | None) -> float | None:
        return None if ttl_s is None else self._clock() + ttl_s

    def _expire(self) -> None:
        now = self._clock()
        for table in (self._values, self._streams):
            dead = [key for key, held in table.items() if held.expires_at is not None and held.expires_at <= now]
            for key in dead:
                del table[key]
