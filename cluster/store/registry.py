"""Who is in the cluster: each engine writes itself into the store once a second, each ingress watches the list.

    engine                            store                             ingress
    Registration.start   ──write──>   engines/<id>/<generation>  <──look── Membership
                 .update                (lives ttl_s)                       tells its listeners of each change
                 .stop   ──DEAD───>

An engine leaves the list when it says so (state DEAD), when a higher generation of its id appears, or when its beat has
not moved for `ttl_s` by the watcher's own clock. While the store cannot be reached nobody leaves: serving goes on with
the last known members, and each gets a full `ttl_s` to be heard again after it returns. A store that hangs, and answers
before a call to it has failed, is no engine's silence either: between two looks no more than `LOOK_S` counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta, Struct, structs

from kvbaton.cluster.store.store import Cursor, Entry, Store, StoreUnavailable, end_task
from kvbaton.engine.request import Natural
from kvbaton.kvtransfer.codec import WireError, decode, pack
from kvbaton.router.engine_info import EngineInfo, EngineState, Role

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
TTL_S = 3.0
POLL_S = 0.5
LOOK_S = 1.0
MAX_BACKOFF_S = 5.0
ENGINES = "engines/"
CHANGES = "engine-changes"  # stream: an event for each change but beats, so that watchers look at once
MAX_ENTRY_BYTES = 64 << 10
MAX_TEXT_CHARS = 4096
_MAX_CHANGES = 64

_Name = Annotated[str, Meta(max_length=256)]
_Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
_Port = Annotated[int, Meta(ge=0, lt=1 << 16)]


class EngineEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands in the store for one engine: its count of beats, then an `EngineInfo` field by field."""

    beat: Natural
    engine_id: _Name
    generation: Natural
    role: Role
    state: EngineState
    host: _Name
    session_port: _Port
    kv_port: _Port
    model_id: _Text
    max_model_len: Natural
    block_size: Natural
    num_blocks: Natural
    prefill_chunk_tokens: Natural
    max_requests: Natural
    reason: _Text


def encode_entry(info: EngineInfo, beat: int) -> bytes:
    """A reason that is too long is cut."""
    info = dataclasses.replace(info, reason=info.reason[:MAX_TEXT_CHARS])
    return pack(EngineEntry(beat, *(getattr(info, name) for name in EngineEntry.__struct_fields__[1:])))


def decode_entry(value: bytes) -> tuple[EngineInfo, int]:
    """(the engine, its beat count). Raises `WireError`."""
    beat, *info = structs.astuple(decode(value, EngineEntry, MAX_ENTRY_BYTES, max_items=64))
    return EngineInfo(*info), beat


class Registration:
    """One engine's entry. Writes on change and every `heartbeat_s`, and survives a store that goes away."""

    def __init__(self, store: Store, info: EngineInfo, heartbeat_s: float = HEARTBEAT_S, ttl_s: float = TTL_S) -> None:
        self.info = info
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._ttl_s = ttl_s
        self._beat = 0
        self._task: asyncio.Task[None] | None = None
        self._outage = Outage(f"engine {info.engine_id}: heartbeat")

    async def start(self) -> None:
        """Write the first entry and go on by itself. Raises `StoreUnavailable`."""
        await self._write(announce=True)
        self._task = asyncio.create_task(self._keep_beating(), name=f"heartbeat-{self.info.engine_id}")

    async def update(self, info: EngineInfo) -> None:
        """Publish a new role, state or address. Without the store it is published with the first beat that succeeds."""
        self.info = info
        await self._try(self._write(announce=True))

    async def stop(self) -> None:
        """Leave the list at once."""
        await end_task(self._task)
        self.info = dataclasses.replace(self.info, state=EngineState.DEAD)
        await self._try(self._write(announce=True))

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self._try(self._write(announce=False))

    async def _try(self, write: Coroutine[Any, Any, None]) -> None:
        """Half a life span for the answer, so that the next beat comes in time on a connection that works."""
        try:
            await asyncio.wait_for(write, self._ttl_s / 2)
        except TimeoutError:
            self._outage.began(StoreUnavailable(f"no answer for {self._ttl_s / 2:g} s"))
        except StoreUnavailable as error:
            self._outage.began(error)
        else:
            self._outage.ended()

    async def _write(self, announce: bool) -> None:
        self._beat += 1
        key = f"{ENGINES}{self.info.engine_id}/{self.info.generation}"
        await self._store.put(key, encode_entry(self.info, self._beat), self._ttl_s)
        if announce:
            await self._store.append(CHANGES, self.info.engine_id.encode(), _MAX_CHANGES)


class Outage:
    """Says once that the store went away and once that it is back; `error` is the text in between."""

    def __init__(self, who: str) -> None:
        self._who = who
        self.error: str | None = None

    def began(self, error: StoreUnavailable) -> None:
        if self.error is None:
            log.warning("%s: %s", self._who, error)
        self.error = str(error)

    def ended(self) -> bool:
        """True when this ends an outage."""
        if self.error is None:
            return False
        log.warning("%s: the store is back", self._who)
        self.error = None
        return True


@dataclass(slots=True)
class _Seen:
    info: EngineInfo
    beat: int
    moved_at: float


class Membership:
    """The engines there are. `engines` is the present list; listeners are called with it after each change."""

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.monotonic, poll_s: float = POLL_S, ttl_s: float = TTL_S
    ) -> None:
        self.engines: tuple[EngineInfo, ...] = ()
        self._store = store
        self._clock = clock
        self._poll_s = poll_s
        self._ttl_s = ttl_s
        self._seen: dict[str, _Seen] = {}
        self._cursor = Cursor(CHANGES, 0)
        self._listeners: list[Callable[[tuple[EngineInfo, ...]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._outage = Outage("membership")
        self._looked_at = clock()
        self._changed = asyncio.Event()

    @property
    def store_error(self) -> str | None:
        """Why the list may be old: the store's last error, None while it answers."""
        return self._outage.error

    def subscribe(self, listener: Callable[[tuple[EngineInfo, ...]], None]) -> None:
        """Call `listener` with the list now and after each change."""
        self._listeners.append(listener)
        listener(self.engines)

    async def left(self, engine_id: str, generation: int) -> None:
        """Returns when this incarnation, once listed, is listed no more: it said so, was replaced, or fell silent."""
        for listed in (True, False):
            while any((i.engine_id, i.generation) == (engine_id, generation) for i in self.engines) is not listed:
                await self._changed.wait()

    async def start(self) -> None:
        """Read the list and watch it from then on. Raises `StoreUnavailable`."""
        await self.look()
        self._task = asyncio.create_task(self._watch(), name="membership")

    async def close(self) -> None:
        await end_task(self._task)

    async def look(self) -> None:
        """Read the entries once and tell the listeners what changed. Raises `StoreUnavailable`."""
        entries = await self._store.entries(ENGINES)
        now = self._clock()
        unseen_s, self._looked_at = max(0.0, now - self._looked_at - LOOK_S), now
        returned = self._outage.ended()
        for seen in self._seen.values():
            seen.moved_at = now if returned else seen.moved_at + unseen_s
        for entry in entries:
            self._note(entry, now)
        self._forget(now)
        self._tell()

    async def _watch(self) -> None:
        backoff_s = self._poll_s
        while True:
            try:
                changes = await self._store.read([self._cursor], _MAX_CHANGES, self._poll_s)
                if changes:
                    self._cursor = Cursor(CHANGES, changes[-1].number)
                await self.look()
                backoff_s = self._poll_s
            except StoreUnavailable as error:
                self._outage.began(error)
                self._cursor = Cursor(CHANGES, 0)  # it may come back with older data, or none
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _note(self, entry: Entry, now: float) -> None:
        try:
            info, beat = decode_entry(entry.value)
        except WireError as error:
            log.warning("ignored %s: %s", entry.key, error)
            return
        seen = self._seen.get(entry.key)
        if seen is None:
            self._seen[entry.key] = _Seen(info, beat, now)
        elif seen.beat != beat:
            seen.info, seen.beat, seen.moved_at = info, beat, now

    def _forget(self, now: float) -> None:
        for key, seen in list(self._seen.items()):
            if now - seen.moved_at > self._ttl_s:
                del self._seen[key]

    def _tell(self) -> None:
        newest: dict[str, EngineInfo] = {}
        for seen in self._seen.values():
            held = newest.get(seen.info.engine_id)
            if held is None or held.generation < seen.info.generation:
                newest[seen.info.engine_id] = seen.info
        alive = (info for info in newest.values() if info.state is not EngineState.DEAD)
        engines = tuple(sorted(alive, key=lambda info: info.engine_id))
        if engines == self.engines:
            return
        self.engines = engines
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(engines)
