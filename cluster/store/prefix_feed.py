"""What each engine's prefix cache holds, from the engines to every ingress's router.

    engine thread ── CacheEvent ──> PrefixPublisher ── batches ──> stream   prefix-events/<engine>/<generation>
                                                    ── snapshot ─> value    prefix-snapshot/<engine>/<generation>
    stream, snapshot ──> PrefixFollower ──> router's prefix index

Events are numbered by the engine's cache. A follower that starts late or sees a number missing begins again from the
newest snapshot and goes on with the events behind it; the stream is kept long enough to reach back to it. A wrong
index costs a longer prefill, never a wrong token, so an outage of the store is only waited for. A store that has lost
its data shows in the number that it gives to the next batch: then a snapshot follows. A quiet engine sends an empty
batch now and then, which also keeps what it has published from expiring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from kvbaton.cluster.store.store import Cursor, Store, StoreUnavailable, end_task
from kvbaton.engine.block_hash import HASH_BYTES, BlockHash
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheEventKind, CacheSnapshot
from kvbaton.engine.request import Natural
from kvbaton.kvtransfer.codec import WireError, decode, pack
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.prefix_index import PrefixIndex

log = logging.getLogger(__name__)

BATCH_S = 0.02  # events of so long travel together
SNAPSHOT_EVERY = 4096  # events between two snapshots
MAX_BATCHES = 2 * SNAPSHOT_EVERY  # so that the stream always reaches back to the newest snapshot
KEEP_S = 3600.0  # what a crashed engine leaves behind disappears by itself
RETRY_S = 1.0
QUIET_S = 20.0
SNAPSHOT_S = KEEP_S / 4
READ_LIMIT = 256
MAX_VALUE_BYTES = 64 << 20


def _names(engine_id: str, generation: int) -> tuple[str, str]:
    return f"prefix-events/{engine_id}/{generation}", f"prefix-snapshot/{engine_id}/{generation}"


class EventBatch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Consecutive events from number `first` on: a byte for each kind (1 = stored), then the hashes end to end."""

    first: Natural
    kinds: bytes
    hashes: bytes


class SnapshotEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A `CacheSnapshot`, its hashes end to end."""

    number: Natural
    hashes: bytes


def encode_events(first: int, events: Sequence[CacheEvent]) -> bytes:
    """`events` are numbered from `first` on."""
    kinds = bytes(event.kind is CacheEventKind.STORED for event in events)
    return pack(EventBatch(first, kinds, b"".join(event.block_hash for event in events)))


def decode_events(value: bytes) -> tuple[int, list[CacheEvent]]:
    """Inverse of `encode_events`: (first number, events). Raises `WireError`."""
    batch = decode(value, EventBatch, MAX_VALUE_BYTES, max_items=8)
    found = _split(batch.hashes)
    if len(found) != len(batch.kinds):
        raise WireError(f"prefix events: {len(batch.kinds)} kinds for {len(found)} hashes")
    return batch.first, [
        CacheEvent(batch.first + i, CacheEventKind.STORED if kind else CacheEventKind.EVICTED, found[i])
        for i, kind in enumerate(batch.kinds)
    ]


def encode_snapshot(snapshot: CacheSnapshot) -> bytes:
    return pack(SnapshotEntry(snapshot.number, b"".join(snapshot.hashes)))


def decode_snapshot(value: bytes) -> CacheSnapshot:
    """Inverse of `encode_snapshot`. Raises `WireError`."""
    entry = decode(value, SnapshotEntry, MAX_VALUE_BYTES, max_items=8)
    return CacheSnapshot(entry.number, tuple(_split(entry.hashes)))


def _split(hashes: bytes) -> list[BlockHash]:
    if len(hashes) % HASH_BYTES:
        raise WireError(f"hashes must be {HASH_BYTES} bytes each, got {len(hashes)} bytes")
    return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]


class PrefixPublisher:
    """The engine's end. `add` and `snapshot` are called on the event loop with what the engine thread saw."""

    def __init__(
        self,
        store: Store,
        engine_id: str,
        generation: int,
        want_snapshot: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`want_snapshot` asks the engine thread for a snapshot, which comes back through `snapshot`."""
        self._store = store
        self._clock = clock
        self._stream, self._key = _names(engine_id, generation)
        self._want_snapshot = want_snapshot
        self._pending: list[CacheEvent] = []
        self._last = 0  # number of the last event sent
        self._batches = 0  # number of the last batch, as the store counts them
        self._since_snapshot = 0
        self._snapshot_at_s = 0.0
        self._snapshot: CacheSnapshot | None = CacheSnapshot(0, ())
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._news.set()  # the empty snapshot
        self._task = asyncio.create_task(self._publish(), name="prefix-publisher")

    async def stop(self) -> None:
        """Stop and remove what was published."""
        await end_task(self._task)
        try:
            await self._store.delete(self._stream)
            await self._store.delete(self._key)
        except StoreUnavailable as error:
            log.info("prefix feed left behind, it expires in %d s: %s", KEEP_S, error)

    def add(self, events: list[CacheEvent]) -> None:
        self._pending += events
        self._since_snapshot += len(events)
        if self._since_snapshot >= SNAPSHOT_EVERY:
            self._since_snapshot = 0
            self._want_snapshot()
        self._news.set()

    def snapshot(self, snapshot: CacheSnapshot) -> None:
        self._snapshot = snapshot
        self._news.set()

    async def _publish(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), QUIET_S)
            await asyncio.sleep(BATCH_S)
            self._news.clear()
            try:
                await self.flush()
            except StoreUnavailable:
                # Events of the outage are lost; the next snapshot repairs every index.
                self._pending = []
                self._want_snapshot()
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Send what there is; where there is nothing, a sign of life. Raises `StoreUnavailable`."""
        events, self._pending = self._pending, []
        snapshot, self._snapshot = self._snapshot, None
        for start in range(0, len(events), SNAPSHOT_EVERY):
            await self._append(events[start].number, events[start : start + SNAPSHOT_EVERY])
        if snapshot is not None:
            await self._store.put(self._key, encode_snapshot(snapshot), ttl_s=KEEP_S)
            self._last = max(self._last, snapshot.number)
            self._snapshot_at_s = self._clock()
        if snapshot is not None or not events:  # after a snapshot it shows the gap to a follower that has missed events
            await self._append(self._last + 1, ())
        if self._clock() - self._snapshot_at_s > SNAPSHOT_S:
            self._snapshot_at_s = self._clock()
            self._want_snapshot()

    async def _append(self, first: int, events: Sequence[CacheEvent]) -> None:
        number = await self._store.append(self._stream, encode_events(first, events), MAX_BATCHES, ttl_s=KEEP_S)
        self._last = max(self._last, first + len(events) - 1)
        if number != self._batches + 1 and self._batches:
            self._want_snapshot()  # the store has lost what was there, the last snapshot with it
        self._batches = number


@dataclass(slots=True)
class _Followed:
    """`known` is the number of the last event in the index; None before the first snapshot was read."""

    engine_id: str
    stream: str
    key: str
    known: int | None = None
    cursor: int = 0


class PrefixFollower:
    """The ingress's end: keeps a router's prefix index true to the engines that `follow` names."""

    def __init__(self, store: Store, index: PrefixIndex) -> None:
        self._store = store
        self._index = index
        self._followed: dict[tuple[str, int], _Followed] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="prefix-follower")

    async def close(self) -> None:
        await end_task(self._task)

    def follow(self, engines: tuple[EngineInfo, ...]) -> None:
        """The present members; a listener for `Membership.subscribe`."""
        wanted = {(info.engine_id, info.generation) for info in engines}
        for gone in self._followed.keys() - wanted:
            del self._followed[gone]
        for engine_id, generation in wanted - self._followed.keys():
            self._followed[engine_id, generation] = _Followed(engine_id, *_names(engine_id, generation))
        self._changed.set()

    async def _run(self) -> None:
        while True:
            if not self._followed:
                self._changed.clear()
                await self._changed.wait()
            try:
                await self.turn(wait_s=RETRY_S)
            except StoreUnavailable:
                self.begin_again()
                await asyncio.sleep(RETRY_S)

    def begin_again(self) -> None:
        """Read every engine from its snapshot on, after an outage: the store may come back with older data, or none."""
        for item in self._followed.values():
            item.known = None

    async def turn(self, wait_s: float) -> None:
        """Read once and bring the index up to date. Raises `StoreUnavailable`."""
        for item in [item for item in self._followed.values() if item.known is None]:
            await self._begin(item)
        by_stream = {item.stream: item for item in self._followed.values() if item.known is not None}
        if not by_stream:
            await asyncio.sleep(wait_s)
            return
        cursors = [Cursor(item.stream, item.cursor) for item in by_stream.values()]
        for event in await self._store.read(cursors, READ_LIMIT, wait_s):
            item = by_stream[event.stream]
            if event.number != item.cursor + 1 and item.cursor:
                item.known = None  # the stream was cut before this reader got there
            item.cursor = event.number
            self._take(item, event.value)

    async def _begin(self, item: _Followed) -> None:
        value = await self._store.get(item.key)
        if value is None:  # the engine will publish one; what the index has is more likely right than nothing
            return
        try:
            snapshot = decode_snapshot(value)
        except WireError as error:
            log.warning("%s: %s", item.key, error)
            return
        self._index.reset(item.engine_id, snapshot.hashes)
        item.known, item.cursor = snapshot.number, 0

    def _take(self, item: _Followed, value: bytes) -> None:
        try:
            first, events = decode_events(value)
        except WireError as error:
            log.warning("%s: %s", item.stream, error)
            item.known = None
            return
        if item.known is None or first > item.known + 1:
            item.known = None
            return
        for event in events[item.known + 1 - first :]:
            item.known = event.number
            change = self._index.stored if event.kind is CacheEventKind.STORED else self._index.evicted
            change(item.engine_id, (event.block_hash,))
