"""Random interleavings of everything that can happen to requests, hand-offs, moves and engines, on a hand-moved clock.

The real client and router over real workers and transfer agents. The network delays, drops, doubles and truncates
messages of one engine while those of others pass; an ingress may be heard late; engines die, come back, or speak with
the voice of an earlier incarnation; sequences move while they decode. After each step every block of every engine has
one owner that its books know, and no transfer may touch a block that its hand-off does not own. After each run every
request ended exactly once with the tokens of the fault-free run, and nothing is held, booked or open on any side.

Small pools, so that sequences are preempted, moves are refused, and engines that prefill and decode at once wait for
each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvbaton.cluster.client.migration import MigrationRefused
from kvbaton.cluster.session.client import SessionLost
from kvbaton.router.engine_info import EngineState, Role
from support.faulty_transport import Fault
from support.net_weather import old_words, read, written
from support.toy_cluster import ToyCluster
from support.toy_engine import PipelinedToyEngine, ToyEngine
from support.toy_service import ToyService

ROLES = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "h0": Role.HYBRID}
NAMES = tuple(ROLES)
names = st.sampled_from(NAMES)
times = st.integers(1, 8)
# No truncated blocks: a reliable transport delivers whole messages; a checksum is what would notice.
strikes = st.sampled_from(
    [
        ("control", Fault.DROP),
        ("control", Fault.DUPLICATE),
        ("control", Fault.TRUNCATE),
        ("done", Fault.DUPLICATE),
        ("done", Fault.DUPLICATE),
        ("done", Fault.DROP),
        ("block", Fault.DROP),
        ("block", Fault.DUPLICATE),
        ("block", Fault.FAIL),
        ("landing", Fault.FAIL),
    ]
)


class HandOffMachine(RuleBasedStateMachine):
    """One prefill engine, two decode engines, and one that does both; each may do anything for any request."""

    engine = ToyEngine

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.count = 0
        self.service = ToyService(28, engine=self.engine)
        self.now(self._start_all())

    async def _start_all(self) -> None:
        for name, role in ROLES.items():
            self.service.start(name, role)

    def now(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def alive(self, name: str) -> bool:
        return self.service.nodes[name].alive

    def name(self, which: int) -> str:
        """One of the youngest requests."""
        return f"r{max(0, self.count - 1 - which)}"

    # ---- requests ---------------------------------------------------------------------------------------------

    @initialize(
        lengths=st.lists(st.integers(1, 60) | st.sampled_from([8, 24, 40]), min_size=2, max_size=6),
        slow=st.none() | names,
        fault=st.one_of(strikes, strikes, strikes, st.none()),
        rounds=st.integers(0, 12),
    )
    def begin(self, lengths: list[int], slow: str | None, fault: tuple[str, Fault] | None, rounds: int) -> None:
        """There is work for everything else to happen to."""
        if fault is not None:
            for node in self.service.nodes.values():
                node.weather.strike(*fault)
        for length in lengths:
            self.submit(length, 40, 1, slow, 0)
        self.run_all(rounds)

    @rule(
        length=st.integers(1, 60) | st.sampled_from([4, 8, 24, 40]),
        max_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 1, 3]),
        slow=st.none() | names,
        rounds=st.sampled_from([8, 6, 3, 0]),
    )
    def submit(self, length: int, max_tokens: int, n: int, slow: str | None, rounds: int) -> None:
        """Prompts of two beginnings, so that caches have some of them, or all."""
        if not any(info.state is EngineState.READY for info in self.service.router.engines):
            return  # it would be refused
        if slow is not None:
            self.service.nodes[slow].weather.delay("block")
        prompt = tuple((self.count % 2 * 13 + i * 7) % 997 for i in range(length))
        self.now(self.service.submit(f"r{self.count}", prompt, max_tokens, n))
        self.count += 1
        self.run_all(rounds)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 5), late=st.sampled_from([None, "first", "second"]), rounds=st.sampled_from([3, 0]))
    def leave(self, which: int, late: str | None, rounds: int) -> None:
        """One engine may hear of it from its peer before the ingress tells it."""
        stream = self.service.streams[self.name(which)]
        if stream.over:
            return
        request = stream.request
        for sample in request.sample_indices if late else ():
            attempt = self.service.client.attempts.working_on(request.request_id, sample)
            if attempt is None:
                continue
            self.service.nodes[getattr(attempt, str(late)).info.engine_id].weather.delay("session")
        stream.cancel()
        self.now(self.service.breathe())
        self.run_all(rounds)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 5), sample=st.integers(0, 2))
    def finish_sample(self, which: int, sample: int) -> None:
        stream = self.service.streams[self.name(which)]
        if not stream.over and sample in stream.tokens and len(stream.tokens) > 1:
            self.now(self._finish_sample(stream.request.request_id, sample))
            stream.cut.add(sample)

    async def _finish_sample(self, name: str, sample: int) -> None:
        self.service.client.finish_sample(name, sample)

    @precondition(lambda self: self.decoding())
    @rule(which=st.integers(0, 5), to=names, rounds=st.integers(0, 5))
    def migrate(self, which: int, to: str, rounds: int) -> None:
        """A sample that decodes is to go on elsewhere; what comes meanwhile is the other rules' business."""
        found = self.decoding()
        name, sample = found[which % len(found)]
        self.now(self._migrate(name, sample, to))
        self.run_all(rounds)

    def decoding(self) -> list[tuple[str, int]]:
        open_ones = [(name, stream) for name, stream in self.service.streams.items() if not stream.over]
        return [(name, i) for name, stream in open_ones for i in stream.tokens if self.service.where(name, i)]

    async def _migrate(self, name: str, sample: int, to: str) -> None:
        with contextlib.suppress(MigrationRefused, SessionLost):
            self.service.client.start_migration(name, sample, to)

    # ---- time goes on -----------------------------------------------------------------------------------------

    @rule(times=times)
    def run_all(self, times: int) -> None:
        self.now(self.service.run(times))

    @rule(name=names, times=times, what=st.sampled_from(["step", "poll", "deliver"]))
    def run_one(self, name: str, times: int, what: str) -> None:
        """One engine's thread, its agent, or its line to the ingress gets ahead of everybody else."""
        for _ in range(times):
            if what == "step":
                self.service.step(name)
            elif what == "poll":
                self.service.nodes[name].poll()
            else:
                self.now(self.service.deliver(name))

    @rule(seconds=st.sampled_from([0.01, 1.0, 4.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        """The longest is more than a lease."""
        self.service.clock.now += seconds

    # ---- faults -----------------------------------------------------------------------------------------------

    @rule(name=names, what=st.sampled_from(["kill", "restart", "reconnect", "drain", "take in"]))
    def change(self, name: str, what: str) -> None:
        if self.alive(name) == (what == "restart"):
            return
        self.now(self._change(name, what))

    async def _change(self, name: str, what: str) -> None:
        service = self.service
        if what == "kill" and sum(map(self.alive, NAMES)) > 1:
            service.kill(name)
        elif what == "restart":
            service.start(name, ROLES[name])
        elif what == "reconnect":
            service.reconnect(name)
        elif what != "kill":
            service.set_state(name, EngineState.DRAINING if what == "drain" else EngineState.READY)
        await service.breathe()

    @rule(name=names, what=st.sampled_from(["block", "control", "session", "release", "release"]))
    def hold_back(self, name: str, what: str) -> None:
        """From here on messages of a kind wait; or the weather clears."""
        if what == "release":
            self.service.nodes[name].release()
        else:
            self.service.nodes[name].weather.delay(what)

    @rule(name=names, what=strikes)
    def strike(self, name: str, what: tuple[str, Fault]) -> None:
        """The next message of a kind that leaves this engine meets a fault, or the next landing that is posted here."""
        self.service.nodes[name].weather.strike(*what)

    @rule(name=names, which=st.integers(0, 5))
    def cut(self, name: str, which: int) -> None:
        self.service.nodes[name].cut(which)

    @rule(name=names, times=times)
    def hear_an_earlier_incarnation(self, name: str, times: int) -> None:
        """In the place of what is due, as soon as it can do harm."""
        node = self.service.nodes[name]
        for _ in range(times if node.alive else 0):
            if old_words(node.transport):
                node.poll()
                break
            self.run_all(1)

    # ---- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def every_block_has_one_owner(self) -> None:
        self.service.audit()

    def teardown(self) -> None:
        try:
            self.now(self._end())
        finally:
            self.loop.close()

    async def _end(self) -> None:
        for name, node in self.service.nodes.items():
            if node.alive:
                self.service.set_state(name, EngineState.READY)
        await self.service.settle()
        self.service.assert_clean()


class PipelinedMachine(HandOffMachine):
    """The same with steps that overlap."""

    engine = PipelinedToyEngine


QUICK = settings(max_examples=30, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
for machine in (HandOffMachine, PipelinedMachine):
    machine.TestCase.settings = QUICK
TestHandOffs = pytest.mark.slow(HandOffMachine.TestCase)
TestPipelinedHandOffs = pytest.mark.slow(PipelinedMachine.TestCase)


@pytest.mark.chaos
@pytest.mark.parametrize("machine", [HandOffMachine, PipelinedMachine])
def test_thousands_more(machine: type[HandOffMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=2000))  # type: ignore[no-untyped-call]


def test_pair_hands_over_exactly() -> None:
    """The plain path, so that a failure of the random test has a simple neighbour."""
    cluster = ToyCluster()
    for name in ("p0", "p1", "d0"):
        cluster.start(name)
    stream = cluster.submit("a", tuple(range(1, 30)), 12, ("p0", "d0"))
    many = cluster.submit("b", tuple(range(5, 40)), 9, ("p1", "d0"), n=3)
    cluster.settle()
    assert stream.request.epoch == 0
    assert many.request.epoch == 0
    cluster.assert_clean()
    assert {name: node.agent.stats().handoffs_acked for name, node in cluster.nodes.items()}["p0"] == 1


@pytest.mark.parametrize("late", ["prefill", "decode"])
def test_blocks_of_an_ended_hand_off_stay_until_the_network_has_let_go(late: str) -> None:
    """The engine that hears of the end from its peer must keep its blocks while delayed messages may still touch them.
    Guards a release of blocks together with the failure."""
    cluster = ToyCluster()
    prefill, decode = cluster.start("p0", send_window=16), cluster.start("d0")  # all ten blocks in flight at once
    prefill.weather.delay("block")
    stream = cluster.submit("a", tuple(range(1, 40)), 12, ("p0", "d0"))
    run(cluster, 6)
    (outgoing,), (incoming,) = prefill.transport.channels.values(), decode.transport.channels.values()
    assert len(read(outgoing)) == len(written(incoming)) == 10
    cluster.nodes["p0" if late == "prefill" else "d0"].weather.delay("session")
    cluster.abort(stream)
    run(cluster, 5)
    assert (len(read(outgoing)), len(written(incoming))) == (10, 10)
    assert (prefill.engine.kv.counts().held, decode.engine.kv.counts().held) == (10, 10)
    cluster.settle()
    cluster.assert_clean()


def run(cluster: ToyCluster, rounds: int) -> None:
    for _ in range(rounds):
        for name in cluster.nodes:
            cluster.nodes[name].poll()
            cluster.step(name)
        cluster.audit()
