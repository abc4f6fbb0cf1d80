"""Guards membership: who is listed, replaced, forgotten and kept, above all while the store is away."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields, replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.registry import EngineEntry, Membership, Registration, decode_entry, encode_entry
from kvbaton.cluster.store.store import MemoryStore, StoreUnavailable
from kvbaton.cluster.store.valkey import EmbeddedValkey
from kvbaton.kvtransfer.codec import WireError, pack, parts_of
from kvbaton.router.engine_info import EngineInfo, EngineState, Role
from support.client_support import eventually
from support.pool_support import settle
from support.session_support import make_info
from support.wire_cases import UNPACKABLE, Wrong, legal, sample, wrong


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FlakyStore(MemoryStore):
    """A memory store that can be switched off."""

    down = False

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0  # how often the entries were read
        self.cursors: list[int] = []  # where a reader of a stream stood, read by read

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        self._check()
        await super().put(key, value, ttl_s)

    async def entries(self, prefix: str):  # type: ignore[no-untyped-def]
        self._check()
        self.looks += 1
        return await super().entries(prefix)

    async def read(self, cursors, limit, wait_s=0.0):  # type: ignore[no-untyped-def]
        self._check()
        self.cursors += [cursor.after for cursor in cursors]
        return await super().read(cursors, limit, wait_s)

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("Redis at redis://h:1/0: refused")


async def put(store: MemoryStore, info: EngineInfo, beat: int) -> None:
    await store.put(f"engines/{info.engine_id}/{info.generation}", encode_entry(info, beat))


def test_entry_round_trip_keeps_every_field() -> None:
    info = make_info("e", 5, generation=3, role=Role.DECODE, state=EngineState.DRAINING, kv_port=7, reason="scale down")
    info = replace(info, prefill_chunk_tokens=77)
    assert decode_entry(encode_entry(info, 9)) == (info, 9)


@given(legal(EngineEntry, {}))
def test_every_entry_comes_back_equal(entry: EngineEntry) -> None:
    info, beat = decode_entry(pack(entry))
    assert decode_entry(encode_entry(info, beat)) == (info, beat)
    assert encode_entry(info, beat) == pack(entry)


def test_an_entry_has_every_field_of_an_engine_in_order() -> None:
    assert EngineEntry.__struct_fields__ == ("beat", *(field.name for field in fields(EngineInfo)))


@pytest.mark.parametrize("case", wrong(EngineEntry, {}), ids=lambda case: case.label)
def test_each_wrong_field_of_an_entry_is_refused_by_name(case: Wrong) -> None:
    with pytest.raises(WireError) as refused:
        decode_entry(msgpack.packb(case.parts))
    assert any(name in str(refused.value) for name in case.names)


@pytest.mark.parametrize("alien", UNPACKABLE, ids=repr)
@pytest.mark.parametrize("at", range(len(EngineEntry.__struct_fields__)))
def test_a_map_or_an_extension_type_is_refused_in_every_field(at: int, alien: object) -> None:
    parts = parts_of(sample(EngineEntry, {}))
    parts[at] = alien
    with pytest.raises(WireError, match="not msgpack"):
        decode_entry(msgpack.packb(parts, datetime=True))


def test_a_reason_that_is_too_long_is_cut() -> None:
    """Guards an engine that nobody lists because its last words are long."""
    info = make_info("e", reason="x" * 10_000)
    assert decode_entry(encode_entry(info, 1))[0].reason == "x" * 4096


@given(st.binary(max_size=60))
def test_garbage_entries_are_refused(value: bytes) -> None:
    with pytest.raises(WireError):
        decode_entry(value)


async def test_listeners_hear_of_engines_that_come_and_change() -> None:
    store, heard = MemoryStore(), []
    membership = Membership(store)
    membership.subscribe(heard.append)
    a, b = make_info("a"), make_info("b")
    await put(store, b, 1)
    await membership.look()
    await put(store, a, 1)
    await membership.look()
    await membership.look()  # nothing new: nobody is called
    await put(store, replace(a, state=EngineState.DRAINING), 2)
    await membership.look()
    assert heard == [(), (b,), (a, b), (replace(a, state=EngineState.DRAINING), b)]
    late: list[tuple[EngineInfo, ...]] = []
    membership.subscribe(late.append)
    assert late == [membership.engines]


async def test_a_higher_generation_replaces_at_once() -> None:
    store = MemoryStore()
    membership = Membership(store)
    old, new = make_info("a"), make_info("a", 2, generation=2)
    await put(store, old, 50)
    await membership.look()
    await put(store, new, 1)
    await membership.look()
    assert membership.engines == (new,)
    await put(store, old, 51)  # the frozen old one beats once more
    await membership.look()
    assert membership.engines == (new,)


async def test_engine_without_a_beat_is_forgotten_after_the_life_span() -> None:
    clock, store = Clock(), MemoryStore()
    membership = Membership(store, clock, ttl_s=3.0)
    info = make_info()
    await put(store, info, 1)
    await membership.look()
    for _ in range(3):
        clock.now += 1.0
        await membership.look()
    assert membership.engines == (info,)
    await put(store, info, 2)
    await membership.look()
    for _ in range(3):
        clock.now += 1.0
        await membership.look()
    assert membership.engines == (info,)
    clock.now += 0.001
    await membership.look()
    assert membership.engines == ()
    await put(store, info, 3)  # it was only frozen
    await membership.look()
    assert membership.engines == (info,)


async def silence(membership: Membership, clock: Clock) -> None:
    """More than a life span of 3 s, looked at as often as a watcher does."""
    for _ in range(10):
        clock.now += 0.5
        await membership.look()
        await settle()


async def test_silence_of_one_is_noticed_while_the_other_beats() -> None:
    """Guards the manager, which replaces an engine that hangs: alive to Ray, silent to the registry."""
    clock, store = Clock(), MemoryStore()
    membership = Membership(store, clock, ttl_s=3.0)
    await put(store, make_info("a"), 1)
    await put(store, make_info("b"), 1)
    await membership.look()
    a, b = (asyncio.create_task(membership.left(name, 1)) for name in "ab")
    await settle()
    for beat in range(2, 6):
        clock.now += 1.0
        await put(store, make_info("b"), beat)
        await membership.look()
    await settle()
    assert (a.done(), b.done()) == (True, False)
    b.cancel()


async def test_an_engine_not_heard_yet_has_not_left() -> None:
    """Guards a start-up: the manager knows of an engine before its first beat is read."""
    clock, store = Clock(), MemoryStore()
    membership = Membership(store, clock, ttl_s=3.0)
    waiting = asyncio.create_task(membership.left("a", 2))
    await put(store, make_info("a"), 1)
    await membership.look()
    await silence(membership, clock)
    assert not waiting.done()
    await put(store, make_info("a", generation=2), 2)
    await membership.look()
    await settle()
    assert not waiting.done()
    await silence(membership, clock)
    assert waiting.done()


async def test_emptied_store_does_not_empty_the_list_at_once() -> None:
    """A Redis that restarts without its data must not cost every stream: engines write themselves again in a second."""
    clock, store = Clock(), MemoryStore()
    membership = Membership(store, clock, ttl_s=3.0)
    info = make_info()
    await put(store, info, 1)
    await membership.look()
    await store.close()
    clock.now += 1.0
    await membership.look()
    assert membership.engines == (info,)


async def test_a_store_that_hangs_is_no_silence_of_the_engines() -> None:
    """Guards against every engine being dropped, and killed as hanging, when a call to the store takes 4 s and then
    answers: the entries have expired by then, and the engines' beats come right behind."""
    clock, store = Clock(), MemoryStore()
    membership = Membership(store, clock, ttl_s=3.0)
    info = make_info()
    await put(store, info, 1)
    await membership.look()
    for beat in range(2, 6):
        await store.close()
        clock.now += 3.9
        await membership.look()
        assert membership.engines == (info,)
        clock.now += 0.5
        await put(store, info, beat)
        await membership.look()
    for _ in range(4):
        assert membership.engines == (info,)
        clock.now += 3.9
        await membership.look()
    assert membership.engines == (), "a dead engine is found all the same"


async def test_a_beat_is_given_up_in_time_for_the_next_one() -> None:
    """Guards an engine that waits for an answer on a dead connection until it counts as silent."""
    store = FlakyStore()
    hangs = asyncio.Event()
    registration = Registration(store, make_info(), heartbeat_s=0.005, ttl_s=0.05)
    await registration.start()

    async def hanging(*args: object, **kwargs: object) -> None:
        hangs.set()
        await asyncio.Event().wait()

    store.put = hanging  # type: ignore[method-assign]
    await hangs.wait()
    beats: list[int] = []

    async def counting(key: str, value: bytes, ttl_s: float | None = None) -> None:
        beats.append(decode_entry(value)[1])

    store.put = counting  # type: ignore[method-assign]
    await eventually(lambda: len(beats) > 1)
    await registration.stop()


async def test_an_emptied_store_is_followed_from_its_new_beginning() -> None:
    """Guards a watcher that waits in the stream of changes at a number which is not there any more."""
    clock, store = Clock(), FlakyStore()
    membership = Membership(store, clock, poll_s=0.002)
    info = make_info()
    await put(store, info, 1)
    for _ in range(3):
        await store.append("engine-changes", b"e0", 64)
    await membership.start()
    await eventually(lambda: 3 in store.cursors)
    await store.close()
    changed = replace(info, role=Role.DECODE)
    await put(store, changed, 2)
    await eventually(lambda: membership.engines == (changed,))
    await membership.close()


async def test_dead_engine_leaves_at_its_own_word() -> None:
    store = MemoryStore()
    membership = Membership(store)
    registration = Registration(store, make_info())
    await registration.start()
    await membership.look()
    assert membership.engines == (make_info(),)
    await registration.stop()
    await membership.look()
    assert membership.engines == ()


async def test_garbage_in_the_store_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    membership = Membership(store)
    await store.put("engines/x/1", b"\xc1")
    await put(store, make_info(), 1)
    await membership.look()
    assert membership.engines == (make_info(),)
    assert "engines/x/1" in caplog.text


async def test_registration_beats_and_updates() -> None:
    store = MemoryStore()
    registration = Registration(store, make_info(), heartbeat_s=0.005)
    await registration.start()
    beats: set[int] = set()

    async def see() -> EngineInfo:
        (entry,) = await store.entries("engines/")
        info, beat = decode_entry(entry.value)
        beats.add(beat)
        return info

    async with asyncio.timeout(10):
        while len(beats) < 4:
            assert await see() == make_info()
            await asyncio.sleep(0.002)
    changed = replace(make_info(), role=Role.PREFILL)
    await registration.update(changed)
    assert await see() == changed
    await registration.stop()


async def test_watcher_sees_a_change_without_waiting_for_its_poll() -> None:
    store = MemoryStore()
    membership = Membership(store, poll_s=2.0)
    await membership.start()
    registration = Registration(store, make_info())
    started = asyncio.get_running_loop().time()
    await registration.start()
    await eventually(lambda: membership.engines == (make_info(),))
    assert asyncio.get_running_loop().time() - started < 1.9
    await registration.stop()
    await eventually(lambda: membership.engines == ())
    await membership.close()


async def test_store_that_goes_away_costs_no_member(caplog: pytest.LogCaptureFixture) -> None:
    clock, store = Clock(), FlakyStore()
    membership = Membership(store, clock, poll_s=0.002, ttl_s=3.0)
    info = make_info()
    await put(store, info, 1)
    await membership.start()
    store.down = True
    await eventually(lambda: membership.store_error is not None)
    assert membership.store_error == "Redis at redis://h:1/0: refused"
    clock.now += 3600
    store.down = False
    await eventually(lambda: membership.store_error is None)
    assert membership.engines == (info,)  # a full life span from here to be heard again
    await store.delete(f"engines/{info.engine_id}/{info.generation}")  # as its time to live does
    for _ in range(4):
        clock.now += 1.0
        store.looks = 0
        await eventually(lambda: store.looks > 0)
    assert membership.engines == ()
    await membership.close()
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["membership: Redis at redis://h:1/0: refused", "membership: the store is back"]


async def test_registration_outlives_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    store = FlakyStore()
    registration = Registration(store, make_info(), heartbeat_s=0.002)
    await registration.start()
    store.down = True
    await eventually(lambda: "refused" in caplog.text)
    draining = replace(make_info(), state=EngineState.DRAINING)
    await registration.update(draining)
    await store.close()
    store.down = False
    await eventually(lambda: "the store is back" in caplog.text)
    (entry,) = await store.entries("engines/")
    assert decode_entry(entry.value)[0] == draining
    await registration.stop()


async def test_store_that_is_down_at_start_is_an_error() -> None:
    store = FlakyStore()
    store.down = True
    with pytest.raises(StoreUnavailable):
        await Registration(store, make_info()).start()
    with pytest.raises(StoreUnavailable):
        await Membership(store).start()


@pytest.mark.redis
async def test_real_server_that_restarts_empty_loses_no_member() -> None:
    server = EmbeddedValkey()
    server.start()
    engine_side, ingress_side = await RedisStore.open(server.url), await RedisStore.open(server.url)
    registration = Registration(engine_side, make_info(), heartbeat_s=0.05, ttl_s=30.0)
    membership = Membership(ingress_side, poll_s=0.05, ttl_s=30.0)
    await registration.start()
    await membership.start()
    lists: list[tuple[EngineInfo, ...]] = []
    membership.subscribe(lists.append)
    port = server.port
    server.stop()
    await eventually(lambda: membership.store_error is not None)
    server.start(port)
    await eventually(lambda: membership.store_error is None, limit_s=20)
    changed = replace(make_info(), role=Role.DECODE)
    await registration.update(changed)
    await eventually(lambda: membership.engines == (changed,))
    assert lists == [(make_info(),), (changed,)]
    await registration.stop()
    await membership.close()
    for store in (engine_side, ingress_side):
        await store.close()
    server.stop()
