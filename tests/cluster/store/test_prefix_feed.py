"""The prefix feed: a router's index equals the engine's cache, also after a late start, a lost event, an outage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from kvbaton.cluster.store import prefix_feed
from kvbaton.cluster.store.prefix_feed import (
    EventBatch,
    PrefixFollower,
    PrefixPublisher,
    SnapshotEntry,
    decode_events,
    decode_snapshot,
    encode_events,
    encode_snapshot,
)
from kvbaton.cluster.store.store import MemoryStore, StoreUnavailable, StreamReset
from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheEventKind, CacheSnapshot, KVManager
from kvbaton.kvtransfer.codec import WireError, parts_of
from kvbaton.router.engine_info import EngineInfo, EngineState, Role
from kvbaton.router.prefix_index import PrefixIndex
from support.wire_cases import UNPACKABLE, Wrong, sample, wrong

ENGINE = EngineInfo("e0", 3, Role.PREFILL, EngineState.READY, "127.0.0.1", 1, 2, "m", 4096, 4, 64, 512, 4096)


class Feed:
    """A real KV manager whose events go through a store into a real index."""

    def __init__(self, store: MemoryStore) -> None:
        self.kv = KVManager(32, 4, prefix_cache=True)
        self.store = store
        self.now = 0.0
        self.publisher = PrefixPublisher(store, "e0", 3, self.snapshot, lambda: self.now)
        self.snapshots = 0
        self.asked = asyncio.Event()

    def snapshot(self) -> None:
        self.snapshots += 1
        self.asked.set()
        self.publisher.snapshot(self.kv.snapshot())

    def prompt(self, start: int, blocks: int) -> list[bytes]:
        hashes = block_hashes(list(range(start, start + 4 * blocks)), 4)
        held = self.kv.match(hashes)
        held += self.kv.allocate(blocks - len(held))
        self.kv.commit(hashes, held)
        self.kv.release(held)
        return hashes

    def cached(self, hashes: list[bytes]) -> int:
        """How many of a prompt's leading blocks the engine's cache has."""
        held = self.kv.match(hashes)
        self.kv.release(held)
        return len(held)

    async def flush(self) -> None:
        self.publisher.add(self.kv.drain_events())
        await self.publisher.flush()


async def follow(store: MemoryStore) -> tuple[PrefixFollower, PrefixIndex]:
    index = PrefixIndex()
    follower = PrefixFollower(store, index)
    follower.follow((ENGINE,))
    await follower.turn(wait_s=0)
    return follower, index


def held(index: PrefixIndex, prompts: Sequence[Sequence[bytes]]) -> list[int]:
    return [index.match("e0", hashes, now=0.0) for hashes in prompts]


async def test_index_follows_stores_and_evictions() -> None:
    feed = Feed(MemoryStore())
    follower, index = await follow(feed.store)
    prompts = [feed.prompt(0, 8), feed.prompt(1000, 20)]
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, prompts) == [8, 20]
    prompts.append(feed.prompt(2000, 10))  # evicts the tail of the oldest
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, prompts) == [feed.cached(p) for p in prompts]
    assert held(index, prompts)[2] == 10


async def test_late_follower_starts_from_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an ingress that starts after the stream was cut."""
    monkeypatch.setattr(prefix_feed, "SNAPSHOT_EVERY", 4)
    monkeypatch.setattr(prefix_feed, "MAX_BATCHES", 2)
    feed = Feed(MemoryStore())
    prompts = []
    for i in range(6):
        prompts.append(feed.prompt(1000 * i, 2))
        await feed.flush()
    assert feed.snapshots == 3
    _, index = await follow(feed.store)
    assert held(index, prompts) == [2] * 6


async def test_follower_that_missed_events_starts_again() -> None:
    feed = Feed(MemoryStore())
    follower, index = await follow(feed.store)
    first = feed.prompt(0, 3)
    await feed.flush()
    await follower.turn(wait_s=0)
    lost = feed.prompt(1000, 3)
    feed.kv.drain_events()  # never published
    after = feed.prompt(2000, 3)
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, [first, lost, after]) == [3, 0, 0], "what follows a gap is not trusted"
    feed.snapshot()
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, [first, lost, after]) == [3, 3, 3]


async def test_outage_is_waited_for_and_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_feed, "RETRY_S", 0.01)
    feed = Feed(MemoryStore())
    append = feed.store.append

    async def down(*args: object, **kwargs: object) -> int:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(feed.store, "append", down)
    feed.publisher.start()
    prompt = feed.prompt(0, 5)
    feed.publisher.add(feed.kv.drain_events())
    async with asyncio.timeout(10):
        await feed.asked.wait()
    monkeypatch.setattr(feed.store, "append", append)
    index = PrefixIndex()
    follower = PrefixFollower(feed.store, index)
    follower.follow((ENGINE,))
    follower.start()
    async with asyncio.timeout(10):
        while held(index, [prompt]) != [5]:  # noqa: ASYNC110 (the index has nobody to tell)
            await asyncio.sleep(0.01)
    await follower.close()
    await feed.publisher.stop()
    assert await feed.store.entries("prefix-snapshot/") == []


async def test_a_store_that_was_emptied_has_everything_again_with_the_next_batch() -> None:
    """Guards an index that stays empty, or stops at a number that the new stream will not have for hours."""
    feed = Feed(MemoryStore())
    follower, index = await follow(feed.store)
    prompts = [feed.prompt(1000 * i, 2) for i in range(4)]
    await feed.flush()
    await feed.flush()
    await follower.turn(wait_s=0)
    await feed.store.close()
    with pytest.raises(StreamReset):
        await follower.turn(wait_s=0)
    follower.begin_again()
    await follower.turn(wait_s=0)
    assert held(index, prompts) == [2] * 4, "what is known stays known"
    await feed.flush()  # nothing new: the sign of life of a quiet engine
    assert feed.snapshots == 1
    await feed.flush()
    prompts.append(feed.prompt(9000, 2))
    await feed.flush()
    for _ in range(2):
        with contextlib.suppress(StreamReset):
            await follower.turn(wait_s=0)
        follower.begin_again()
    await follower.turn(wait_s=0)
    assert held(index, prompts) == [2] * 5
    assert feed.snapshots == 1, "once is enough"
    _, late = await follow(feed.store)
    assert held(late, prompts) == [2] * 5


async def test_a_quiet_engine_is_still_known_after_its_life_span() -> None:
    """Guards an ingress that starts an hour after the last prompt, when what was published then has expired."""
    feed = Feed(MemoryStore(lambda: feed.now))
    prompt = feed.prompt(0, 5)
    await feed.flush()
    while feed.now < 2.5 * prefix_feed.KEEP_S:
        feed.now += prefix_feed.QUIET_S
        await feed.flush()
    assert 8 <= feed.snapshots <= 12
    follower, index = await follow(feed.store)
    assert held(index, [prompt]) == [5]
    prompt = feed.prompt(5000, 3)
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, [prompt]) == [3]


async def test_a_hostile_snapshot_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """Guards the one task that follows every engine: a value that makes no sense must neither end it nor be believed,
    and the engine's next snapshot must be read."""
    feed = Feed(MemoryStore())
    prompt = feed.prompt(0, 3)
    await feed.flush()
    await feed.store.put("prefix-snapshot/e0/3", b"\xc1")
    follower, index = await follow(feed.store)
    assert "prefix-snapshot/e0/3" in caplog.text
    assert held(index, [prompt]) == [0], "events count only from a snapshot on"
    feed.snapshot()
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, [prompt]) == [3]


async def test_a_hostile_batch_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """As above, in the stream: what comes behind it is not trusted before the next snapshot."""
    feed = Feed(MemoryStore())
    follower, index = await follow(feed.store)
    await feed.store.append("prefix-events/e0/3", b"\xc1", 16)
    prompt = feed.prompt(0, 3)
    await feed.flush()
    await follower.turn(wait_s=0)
    assert "prefix-events/e0/3" in caplog.text
    assert held(index, [prompt]) == [0]
    feed.snapshot()
    await feed.flush()
    await follower.turn(wait_s=0)
    assert held(index, [prompt]) == [3]


HASHES = {"hashes": b"h" * 32}
DECODERS = {EventBatch: decode_events, SnapshotEntry: decode_snapshot}


def broken_values() -> Iterator[Any]:
    for kind in DECODERS:
        for case in wrong(kind, HASHES | {"kinds": b"\x01\x00"}):
            yield pytest.param(kind, case, id=f"{kind.__name__}: {case.label}")


@pytest.mark.parametrize(("kind", "case"), list(broken_values()))
def test_each_wrong_field_of_a_value_is_refused_by_name(kind: type[Struct], case: Wrong) -> None:
    with pytest.raises(WireError) as refused:
        DECODERS[kind](msgpack.packb(case.parts))
    assert any(name in str(refused.value) for name in case.names)


@pytest.mark.parametrize("alien", UNPACKABLE, ids=repr)
@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.__name__)
def test_a_map_or_an_extension_type_is_refused_in_every_field(kind: type[Struct], alien: object) -> None:
    good = parts_of(sample(kind, HASHES))
    for at in range(len(good)):
        with pytest.raises(WireError, match="not msgpack"):
            DECODERS[kind](msgpack.packb([*good[:at], alien, *good[at + 1 :]], datetime=True))


@given(
    st.integers(0, 1 << 62), st.lists(st.tuples(st.sampled_from(CacheEventKind), st.binary(min_size=16, max_size=16)))
)
def test_every_batch_comes_back_equal(first: int, changes: list[tuple[CacheEventKind, bytes]]) -> None:
    events = [CacheEvent(first + i, kind, block_hash) for i, (kind, block_hash) in enumerate(changes)]
    assert decode_events(encode_events(first, events)) == (first, events)


@given(st.integers(0, 1 << 62), st.lists(st.binary(min_size=16, max_size=16)).map(tuple))
def test_every_snapshot_comes_back_equal(number: int, hashes: tuple[bytes, ...]) -> None:
    snapshot = CacheSnapshot(number, hashes)
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x93\x01\xc4\x01\x01\xc4\x03abc", b"\x80"])
def test_hostile_values_are_refused(value: bytes) -> None:
    for read in DECODERS.values():
        with pytest.raises(WireError):
            read(value)


def test_a_batch_needs_a_whole_hash_for_each_kind() -> None:
    assert [event.number for event in decode_events(encode_events_of(3))[1]] == [7, 8, 9]
    for kinds, hashes in ((3, 31), (3, 32), (1, 32), (0, 16)):
        with pytest.raises(WireError, match="hashes"):
            decode_events(msgpack.packb([7, bytes(kinds), bytes(hashes)]))
    with pytest.raises(WireError, match="hashes"):
        decode_snapshot(msgpack.packb([7, bytes(17)]))


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_a_value(data: bytes) -> None:
    for read in DECODERS.values():
        with contextlib.suppress(WireError):
            read(data)


def encode_events_of(count: int) -> bytes:
    return encode_events(7, [CacheEvent(7 + i, CacheEventKind.STORED, bytes(16)) for i in range(count)])
