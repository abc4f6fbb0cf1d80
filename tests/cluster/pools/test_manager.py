"""The pool manager on a hand-moved clock with scripted engines: starts, replacements, back-off, switches, stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvbaton.cluster.pools.manager import PoolManager, PoolView
from kvbaton.cluster.pools.supervisor import Backoff, EngineSpec
from kvbaton.router.engine_info import EngineState, Role
from support.pool_support import HandClock, ScriptedFactory, ScriptedState, settle

BACKOFF = Backoff(first_s=1.0, limit_s=8.0, stable_s=60.0)


class Bench:
    """A manager with everything round it in the test's hand."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.factory = ScriptedFactory()
        self.state = ScriptedState()
        self.manager = PoolManager(self.factory, self.state, self.clock, BACKOFF)

    async def want(self, prefill: int, decode: int, hybrid: int = 0) -> None:
        self.state.want(prefill, decode, hybrid)
        await settle()

    def view(self, engine_id: str) -> tuple[int, Role, EngineState]:
        engine = {item.engine_id: item for item in self.manager.view().engines}[engine_id]
        return engine.generation, engine.role, engine.state


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.manager.start()
    await settle()
    yield bench
    await bench.manager.stop()
    stopped = {line.split()[1] for line in bench.factory.book if line.startswith(("stop", "die"))}
    assert {engine.name for engine in bench.factory.engines.values()} <= stopped  # nothing outlives its manager


async def test_starts_what_is_wanted(bench: Bench) -> None:
    await bench.want(1, 2)
    assert bench.factory.book == ["start engine-0/1 prefill", "start engine-1/1 decode", "start engine-2/1 decode"]
    assert bench.view("engine-2") == (1, Role.DECODE, EngineState.READY)
    assert bench.manager.view().settled


async def test_is_not_settled_before_every_engine_is_up(bench: Bench) -> None:
    """Guards the launcher, which opens the endpoint when the pools are settled."""
    assert not bench.manager.view().settled
    bench.factory.hold = asyncio.Event()
    await bench.want(1, 1)
    assert not bench.manager.view().settled
    bench.factory.hold.set()
    await settle()
    assert bench.manager.view().settled


async def test_a_dead_engine_is_replaced_at_once_under_a_new_generation(bench: Bench) -> None:
    await bench.want(1, 1)
    bench.factory.engines["engine-1"].die("killed by signal 9")
    await settle()
    assert bench.factory.book[-2:] == ["die engine-1/1", "start engine-1/2 decode"]
    assert bench.view("engine-1") == (2, Role.DECODE, EngineState.READY)
    assert bench.view("engine-0") == (1, Role.PREFILL, EngineState.READY)


async def test_generations_come_from_the_state_not_from_memory() -> None:
    """Guards a new manager beside engines of an old one: it must not give out their generations again."""
    bench = Bench()
    bench.state.base = 7
    bench.manager.start()
    await bench.want(0, 0, 1)
    assert bench.factory.book == ["start engine-0/8 hybrid"]
    await bench.manager.stop()


async def test_a_store_that_lost_its_data_gives_out_no_generation_again(bench: Bench) -> None:
    """Guards against a late message for a dead engine that reaches its replacement under the same generation."""
    await bench.want(0, 0, 1)
    for _ in range(2):
        bench.factory.engines["engine-0"].die("killed")
        await settle()
        await bench.clock.advance(BACKOFF.stable_s)
    bench.state.forget()
    bench.factory.engines["engine-0"].die("killed")
    await settle()
    assert bench.view("engine-0") == (4, Role.HYBRID, EngineState.READY)


async def test_backs_off_when_starts_fail_again_and_again(bench: Bench) -> None:
    """Guards against a hot loop on a machine that cannot start the engine: 0, 1, 2, 4, 8, 8 ... seconds."""
    bench.factory.fail = lambda spec: "out of memory"
    await bench.want(0, 0, 1)
    waits = []
    for _ in range(5):
        assert bench.view("engine-0")[2] is EngineState.DEAD
        (wait,) = bench.clock.sleeping_for
        waits.append(wait)
        await bench.clock.advance(wait)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert bench.manager.view().engines[0].reason == "out of memory"
    assert bench.manager.view().engines[0].failures == 7


async def test_no_start_before_the_wait_is_over(bench: Bench) -> None:
    bench.factory.fail = lambda spec: "no"
    await bench.want(0, 0, 1)
    started = len(bench.factory.book)
    await bench.clock.advance(0.999)
    assert len(bench.factory.book) == started
    await bench.clock.advance(0.001)
    assert len(bench.factory.book) == started + 1


async def test_an_engine_that_was_up_long_enough_starts_from_the_beginning(bench: Bench) -> None:
    await bench.want(0, 0, 1)
    for generation in range(1, 4):
        await bench.clock.advance(BACKOFF.stable_s)
        bench.factory.engines["engine-0"].die("chance")
        await settle()
        assert bench.view("engine-0") == (generation + 1, Role.HYBRID, EngineState.READY)
        assert bench.manager.view().engines[0].failures == 1


async def test_an_engine_that_dies_young_waits_longer_each_time(bench: Bench) -> None:
    await bench.want(0, 0, 1)
    bench.factory.engines["engine-0"].die("first")
    await settle()
    bench.factory.engines["engine-0"].die("second")
    await settle()
    assert bench.clock.sleeping_for == [1.0]
    assert bench.view("engine-0") == (2, Role.HYBRID, EngineState.DEAD)


async def test_roles_are_switched_before_anything_is_started(bench: Bench) -> None:
    await bench.want(2, 1)
    await bench.want(1, 2)
    assert bench.factory.book[-1] == "switch engine-1/1 decode"
    assert bench.view("engine-1") == (1, Role.DECODE, EngineState.READY)
    assert bench.manager.view().settled


async def test_a_switch_that_fails_replaces_the_engine_in_the_new_role(bench: Bench) -> None:
    """Guards against an engine that is counted as decode and still prefills."""
    await bench.want(2, 1)
    bench.factory.engines["engine-1"].switch_fails = "does not answer"
    await bench.want(1, 2)
    assert bench.factory.book[-2:] == ["stop engine-1/1", "start engine-1/2 decode"]
    assert bench.view("engine-1") == (2, Role.DECODE, EngineState.READY)


async def test_surplus_engines_are_stopped(bench: Bench) -> None:
    await bench.want(2, 2)
    await bench.want(1, 1)
    assert bench.factory.book[-2:] == ["stop engine-1/1", "stop engine-3/1"]
    assert [engine.engine_id for engine in bench.manager.view().engines] == ["engine-0", "engine-2"]


async def test_a_start_in_progress_is_abandoned_when_no_longer_wanted(bench: Bench) -> None:
    """Guards against an engine that nobody owns: started, then forgotten, its GPU taken for ever."""
    bench.factory.hold = asyncio.Event()
    await bench.want(1, 1)
    await bench.want(0, 0, 1)
    assert bench.factory.book[2:] == ["abandon engine-1/1"]
    bench.factory.hold.set()
    await settle()
    assert bench.factory.book[3:] == ["switch engine-0/1 hybrid"]  # started as prefill, settled in the role asked for
    assert bench.view("engine-0") == (1, Role.HYBRID, EngineState.READY)


async def test_a_store_that_is_away_delays_a_start(bench: Bench) -> None:
    """Guards generations: none is made up while the store cannot be asked."""
    bench.state.away = True
    await bench.want(0, 0, 1)
    assert bench.factory.book == []
    assert "connection refused" in bench.manager.view().engines[0].reason
    bench.state.away = False
    await bench.clock.advance(1.0)
    assert bench.factory.book == ["start engine-0/1 hybrid"]


async def test_a_factory_that_breaks_does_not_end_supervision(bench: Bench) -> None:
    def explode(spec: EngineSpec) -> str | None:
        if spec.generation < 3:
            raise RuntimeError("a bug")
        return None

    bench.factory.fail = explode
    await bench.want(0, 0, 1)
    assert bench.manager.view().engines[0].reason == "RuntimeError: a bug"
    await bench.clock.advance(1.0)
    assert bench.view("engine-0") == (3, Role.HYBRID, EngineState.READY)


async def test_watchers_see_each_change(bench: Bench) -> None:
    """Guards the launcher's progress lines: `changed` must not miss a change between two calls."""
    seen: list[PoolView] = []

    async def watch() -> None:
        version = bench.manager.view().version
        while not (seen and seen[-1].settled):
            view = await bench.manager.changed(version)
            version = view.version
            seen.append(view)

    watcher = asyncio.create_task(watch())
    await bench.want(1, 1)
    await asyncio.wait_for(watcher, 5)
    versions = [view.version for view in seen]
    assert versions == sorted(set(versions))


async def test_a_new_manager_takes_over_the_engines_of_a_dead_one() -> None:
    """Guards a restarted manager: engines that served on must be neither started twice nor forgotten."""
    bench = Bench()
    for role, engine_id in ((Role.PREFILL, "engine-0"), (Role.DECODE, "engine-3"), (Role.DECODE, "engine-4")):
        await bench.factory.start(EngineSpec(engine_id, 5, role))
    bench.factory.book.clear()
    bench.state.base = 5
    bench.manager.start()
    await bench.want(1, 1)
    assert bench.factory.book == ["stop engine-4/5"]
    assert bench.view("engine-3") == (5, Role.DECODE, EngineState.READY)
    bench.factory.engines["engine-3"].die("later")
    await settle()
    assert bench.factory.book[1:] == ["die engine-3/5", "start engine-3/6 decode"]
    await bench.manager.stop()


async def test_stop_ends_a_start_in_progress_and_a_back_off() -> None:
    bench = Bench()
    bench.factory.fail = lambda spec: "no" if spec.engine_id == "engine-0" else None
    bench.manager.start()
    await bench.want(1, 0)
    bench.factory.hold = asyncio.Event()
    await bench.want(1, 1)
    await bench.manager.stop()
    assert bench.factory.book[-1] == "abandon engine-1/1"
    assert bench.manager.view().engines == ()
