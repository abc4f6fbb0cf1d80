"""Guards that both stores mean the same: one suite over the in-memory store and a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.store import (
    Cursor,
    Entry,
    MemoryStore,
    Store,
    StoreUnavailable,
    StreamEvent,
    StreamReset,
    redacted,
)
from kvbaton.cluster.store.valkey import EmbeddedValkey


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey()
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    made: Store
    if request.param == "memory":
        made = MemoryStore()
    else:
        server: EmbeddedValkey = request.getfixturevalue("valkey")
        made = await RedisStore.open(server.url, namespace=f"test-{time.monotonic_ns()}")
    yield made
    await made.close()


async def gone(store: Store, key: str) -> None:
    async with asyncio.timeout(10):
        while await store.get(key) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_values_are_put_read_replaced_and_deleted(store: Store) -> None:
    assert await store.get("a") is None
    await store.put("a", b"\x00\xff")
    assert await store.get("a") == b"\x00\xff"
    await store.put("a", b"")
    assert await store.get("a") == b""
    await store.delete("a")
    await store.delete("a")
    assert await store.get("a") is None


async def test_a_value_lives_as_long_as_its_last_put_says(store: Store) -> None:
    await store.put("brief", b"1", ttl_s=0.02)
    await store.put("kept", b"1", ttl_s=0.02)
    await store.put("kept", b"2")
    await store.put("long", b"1", ttl_s=600)
    await gone(store, "brief")
    assert await store.entries("") == [Entry("kept", b"2"), Entry("long", b"1")]


async def test_entries_are_those_of_the_prefix_by_key(store: Store) -> None:
    for key in ("e/b", "e/a", "f/a", "e[1]/x", "e*/x"):
        await store.put(key, key.encode())
    assert await store.entries("e/") == [Entry("e/a", b"e/a"), Entry("e/b", b"e/b")]
    assert await store.entries("e*") == [Entry("e*/x", b"e*/x")]
    assert await store.entries("e[1]") == [Entry("e[1]/x", b"e[1]/x")]
    assert await store.entries("nothing") == []


async def test_counters_count_from_one_for_everybody(store: Store) -> None:
    assert sorted(await asyncio.gather(*(store.increment("c") for _ in range(20)))) == list(range(1, 21))
    assert await store.increment("d") == 1


async def test_stream_numbers_have_no_gap_however_many_append(store: Store) -> None:
    numbers = await asyncio.gather(*(store.append("s", b"%d" % i, 100) for i in range(30)))
    assert sorted(numbers) == list(range(1, 31))
    events = await store.read([Cursor("s", 0)], 100)
    assert [event.number for event in events] == list(range(1, 31))
    assert sorted(event.value for event in events) == sorted(b"%d" % i for i in range(30))


async def test_reading_goes_on_after_the_cursor_and_stops_at_the_limit(store: Store) -> None:
    for i in range(5):
        await store.append("s", b"%d" % i, 100)
    await store.append("t", b"x", 100)
    events = await store.read([Cursor("s", 2), Cursor("t", 0), Cursor("u", 0)], 2)
    assert events == [StreamEvent("s", 3, b"2"), StreamEvent("s", 4, b"3"), StreamEvent("t", 1, b"x")]
    assert await store.read([Cursor("s", 5)], 10) == []
    assert await store.read([], 10) == []


async def test_stream_keeps_the_newest_so_that_a_slow_reader_sees_the_gap(store: Store) -> None:
    for i in range(10):
        await store.append("s", b"%d" % i, 3)
    assert [event.number for event in await store.read([Cursor("s", 2)], 100)] == [8, 9, 10]


async def test_waiting_reader_wakes_with_the_event(store: Store) -> None:
    reading = asyncio.create_task(store.read([Cursor("s", 0)], 10, wait_s=2.0))
    await asyncio.sleep(0)
    await store.append("other", b"x", 10)
    await store.append("s", b"now", 10)
    assert await reading == [StreamEvent("s", 1, b"now")]


async def test_waiting_ends_without_an_event(store: Store) -> None:
    assert await store.read([Cursor("s", 0)], 10, wait_s=0.02) == []


async def test_deleted_stream_starts_again_at_one(store: Store) -> None:
    await store.append("s", b"a", 10)
    await store.append("s", b"b", 10)
    await store.delete("s")
    assert await store.read([Cursor("s", 0)], 10) == []
    assert await store.append("s", b"c", 10) == 1


async def test_cursor_past_the_end_is_told(store: Store) -> None:
    """Guards a reader that waits for a number which a store that was emptied gives out in an hour or never."""
    await store.append("s", b"a", 10)
    await store.append("t", b"a", 10)
    for wait_s in (0.0, 0.01):
        assert await store.read([Cursor("s", 1), Cursor("t", 1)], 10, wait_s) == []
        with pytest.raises(StreamReset, match="has lost t"):
            await store.read([Cursor("s", 1), Cursor("t", 2)], 10, wait_s)
        assert await store.read([Cursor("s", 0), Cursor("t", 2)], 10, wait_s) == [StreamEvent("s", 1, b"a")]


async def test_stream_of_a_dead_writer_vanishes(store: Store) -> None:
    await store.append("s", b"a", 10, ttl_s=0.02)
    async with asyncio.timeout(10):
        while await store.read([Cursor("s", 0)], 10):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert await store.append("s", b"b", 10, ttl_s=600) == 1


async def test_memory_store_expires_by_its_clock() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    await store.put("k", b"v", ttl_s=3.0)
    now = 2.999
    assert await store.get("k") == b"v"
    now = 3.0
    assert await store.get("k") is None


@pytest.mark.redis
async def test_namespaces_do_not_meet(valkey: EmbeddedValkey) -> None:
    one, two = await RedisStore.open(valkey.url, "one"), await RedisStore.open(valkey.url, "two")
    await one.put("k", b"v")
    assert await two.entries("") == []
    assert await one.entries("") == [Entry("k", b"v")]
    await one.close()
    await two.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://h:1/0"),
        ("rediss://user:se@cret@h:1/2?password=secret", "rediss://h:1/2"),
        ("redis://h:1", "redis://h:1"),
    ],
)
def test_urls_are_shown_without_their_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


async def test_server_that_is_down_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnavailable, match=r"Redis at redis://127.0.0.1:1/0: ") as failure:
        await RedisStore.open("redis://:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in str(failure.value)


async def test_url_that_is_none_is_refused() -> None:
    with pytest.raises(StoreUnavailable, match="'localhost:6379' is not a Redis URL"):
        await RedisStore.open("localhost:6379")


@pytest.mark.redis
async def test_wrong_password_is_refused(valkey: EmbeddedValkey) -> None:
    with pytest.raises(StoreUnavailable, match=f"Redis at redis://127.0.0.1:{valkey.port}/0: "):
        await RedisStore.open(f"redis://:wrong@127.0.0.1:{valkey.port}/0")


@pytest.mark.redis
async def test_store_works_again_when_the_server_is_back() -> None:
    """Every call fails by name while the server is gone, and the same store object recovers by itself."""
    server = EmbeddedValkey()
    server.start()
    store = await RedisStore.open(server.url)
    await store.put("k", b"v")
    port = server.port
    server.stop()
    for call in (store.get("k"), store.append("s", b"x", 1), store.read([Cursor("s", 0)], 1, 0.1), store.entries("")):
        with pytest.raises(StoreUnavailable, match=f":{port}/0"):
            await call
    server.start(port)
    assert await store.get("k") is None  # nothing was kept on disk
    await store.put("k", b"w")
    assert await store.get("k") == b"w"
    await store.close()
    server.stop()


@pytest.mark.redis
def test_embedded_server_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    server = EmbeddedValkey()
    url = server.start()
    assert url.startswith("redis://:")
    assert url.endswith(f"@127.0.0.1:{server.port}/0")
    pid = server.pid
    assert pid is not None
    password = url.split(":")[2].split("@")[0]
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"valkey-server" in command
    assert password.encode() not in command
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert f"0100007F:{server.port:04X}" in listening
    assert f"00000000:{server.port:04X}" not in listening
    server.stop()
    server.stop()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.redis
def test_embedded_server_dies_with_its_killed_parent(tmp_path: Path) -> None:
    """A launcher killed by SIGKILL cannot stop anything itself, nor remove a folder."""
    import signal
    import subprocess
    import sys

    program = (
        "import pathlib, sys; from kvbaton.cluster.store.valkey import EmbeddedValkey\n"
        "server = EmbeddedValkey(pathlib.Path(sys.argv[1])); server.start(); print(server.pid, flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)
    assert list(tmp_path.iterdir()) == []
    parent.stdout.close()
    if parent.stdin is not None:
        parent.stdin.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
