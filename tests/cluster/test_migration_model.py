"""Random interleavings round the real client and router: requests, moves, drains, aborts, deaths, cuts, late words.

After each step every block of every engine has one owner that the books know. After each run every stream has the
tokens of the fault-free run, and nothing is held, booked or open anywhere. Small pools, so that sequences are
preempted, moves are refused, and engines that prefill and decode at once wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbaton.cluster.client_moves import MoveRefused
from kvbaton.cluster.session_client import SessionLost
from kvbaton.kvtransfer.faults import Fault
from kvbaton.router.engine_info import EngineState, Role
from support.toy_engine import PipelinedToyEngine, ToyEngine
from support.toy_service import ToyService

ROLES = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "h0": Role.HYBRID}
NAMES = tuple(ROLES)
names = st.sampled_from(NAMES)


class MovingMachine(RuleBasedStateMachine):
    engine = ToyEngine

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.count = 0
        self.service = ToyService(28, engine=self.engine)
        self.now(self.start_all())

    async def start_all(self) -> None:
        for name, role in ROLES.items():
            self.service.start(name, role)

    def now(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def alive(self, name: str) -> bool:
        return self.service.nodes[name].alive

    @rule(length=st.integers(1, 60), max_tokens=st.integers(1, 40), n=st.sampled_from([1, 1, 1, 3]))
    def submit(self, length: int, max_tokens: int, n: int) -> None:
        if not any(info.state is EngineState.READY for info in self.service.router.engines):
            return  # it would be refused
        prompt = tuple((self.count % 5 * 13 + i * 7) % 997 for i in range(length))
        self.now(self.service.submit(f"r{self.count}", prompt, max_tokens, n))
        self.count += 1

    @rule(times=st.integers(1, 8))
    def run_all(self, times: int) -> None:
        self.now(self.service.run(times))

    @rule(name=names, times=st.integers(1, 4))
    def step(self, name: str, times: int) -> None:
        for _ in range(times):
            self.service.step(name)

    @rule(name=names)
    def poll(self, name: str) -> None:
        self.service.nodes[name].poll()

    @rule(name=names)
    def deliver(self, name: str) -> None:
        self.now(self.service.deliver(name))

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 100), sample=st.integers(0, 2), to=names)
    def migrate(self, which: int, sample: int, to: str) -> None:
        self.now(self._migrate(f"r{which % self.count}", sample, to))

    async def _migrate(self, name: str, sample: int, to: str) -> None:
        flight = self.service.client._flights.get(name)
        view = self.service.router.view(to)
        if flight is not None and sample in flight.samples and view is not None:
            with contextlib.suppress(MoveRefused, SessionLost):
                self.service.client.moves.start(flight, sample, view.info)

    @rule(name=names, draining=st.booleans())
    def drain(self, name: str, draining: bool) -> None:
        if self.alive(name):
            self.now(self._set_state(name, EngineState.DRAINING if draining else EngineState.READY))

    async def _set_state(self, name: str, state: EngineState) -> None:
        self.service.set_state(name, state)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 100))
    def leave(self, which: int) -> None:
        stream = self.service.streams[f"r{which % self.count}"]
        if not stream.over:
            stream.cancel()
            self.now(self.service.breathe())

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 100), sample=st.integers(0, 2))
    def finish_sample(self, which: int, sample: int) -> None:
        stream = self.service.streams[f"r{which % self.count}"]
        if not stream.over and sample in stream.tokens and len(stream.tokens) > 1:
            self.now(self._finish_sample(stream.request.request_id, sample))
            stream.cut.add(sample)

    async def _finish_sample(self, name: str, sample: int) -> None:
        self.service.client.finish_sample(name, sample)

    @rule(seconds=st.sampled_from([0.01, 1.0, 4.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.service.clock.now += seconds

    @rule(name=names)
    def kill(self, name: str) -> None:
        if self.alive(name) and sum(map(self.alive, NAMES)) > 1:
            self.now(self._do(self.service.kill, name))

    @rule(name=names)
    def restart(self, name: str) -> None:
        if not self.alive(name):
            self.now(self._do(self.service.start, name, ROLES[name]))

    @rule(name=names)
    def reconnect(self, name: str) -> None:
        if self.alive(name):
            self.now(self._do(self.service.reconnect, name))

    async def _do(self, what: Any, *args: Any) -> None:
        what(*args)
        await self.service.breathe()

    @rule(name=names, which=st.integers(0, 5))
    def cut(self, name: str, which: int) -> None:
        self.service.nodes[name].cut(which)

    @rule(name=names, fault=st.sampled_from([Fault.DROP, Fault.DUPLICATE, Fault.TRUNCATE]))
    def break_a_frame(self, name: str, fault: Fault) -> None:
        self.service.nodes[name].weather.strike("control", fault)

    @rule(name=names, what=st.sampled_from(["block", "control"]))
    def delay(self, name: str, what: str) -> None:
        self.service.nodes[name].weather.delay(what)

    @rule(name=names)
    def release(self, name: str) -> None:
        self.service.nodes[name].release()

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


class PipelinedMachine(MovingMachine):
    """The same with steps that overlap."""

    engine = PipelinedToyEngine


for machine in (MovingMachine, PipelinedMachine):
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestMoving = MovingMachine.TestCase
TestPipelinedMoving = PipelinedMachine.TestCase
