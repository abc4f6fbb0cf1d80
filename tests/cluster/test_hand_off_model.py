"""Random interleavings of everything that can happen to requests, hand-offs and engines, on a hand-moved clock.

The network delays, drops, doubles and truncates messages of one engine while those of others pass; an ingress may be
heard late. After each step no transfer may touch a block that its hand-off does not own. After each run: every request
ended exactly once with the tokens of the fault-free run, no block is held anywhere, and no hand-off is open on either
side.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbaton.kvtransfer.faults import Fault
from support.net_weather import read, written
from support.toy_cluster import ToyCluster

NAMES = ("p0", "p1", "d0", "d1")


class HandOffMachine(RuleBasedStateMachine):
    """Two prefill and two decode engines; any of them may also serve locally."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = ToyCluster()
        for name in NAMES:
            self.cluster.start(name)
        self.count = 0

    def alive(self, prefix: str) -> list[str]:
        return [name for name in NAMES if name.startswith(prefix) and self.cluster.nodes[name].alive]

    @rule(
        length=st.integers(1, 60),
        max_tokens=st.integers(1, 20),
        n=st.sampled_from([1, 1, 1, 3]),
        choice=st.integers(0, 7),
        slow_link=st.sampled_from([True, False]),
        rounds=st.sampled_from([8, 6, 3, 0]),
    )
    def submit(self, length: int, max_tokens: int, n: int, choice: int, slow_link: bool, rounds: int) -> None:
        prefill, decode = self.alive("p"), self.alive("d")
        if not prefill + decode:
            return
        prompt = tuple((self.count % 5 * 13 + i * 7) % 997 for i in range(length))
        if prefill and decode and choice < 6:
            legs: tuple[str, ...] = (prefill[choice % len(prefill)], decode[choice // 2 % len(decode)])
        else:
            legs = ((prefill + decode)[choice % len(prefill + decode)],)
        if slow_link:
            self.cluster.nodes[legs[0]].weather.delay("block")
        self.cluster.submit(f"r{self.count}", prompt, max_tokens, legs, n)
        self.count += 1
        self.run_all(rounds)

    @rule(name=st.sampled_from(NAMES), times=st.integers(1, 4))
    def step(self, name: str, times: int) -> None:
        for _ in range(times):
            self.cluster.step(name)

    @rule(name=st.sampled_from(NAMES))
    def poll(self, name: str) -> None:
        self.cluster.nodes[name].poll()

    @rule(times=st.integers(1, 6))
    def run_all(self, times: int) -> None:
        run(self.cluster, times)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 5), late_leg=st.sampled_from([1, 0, None]), rounds=st.sampled_from([3, 0]))
    def abort(self, which: int, late_leg: int | None, rounds: int) -> None:
        """One of the youngest requests; one engine may hear of it from its peer before the ingress tells it."""
        stream = self.cluster.streams[f"r{max(0, self.count - 1 - which)}"]
        if stream.over:
            return
        if late_leg is not None and late_leg < len(stream.legs):
            self.cluster.nodes[stream.legs[late_leg]].weather.delay("session")
        self.cluster.abort(stream)
        self.run_all(rounds)

    @rule(seconds=st.sampled_from([0.01, 1.0, 4.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.clock.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        if self.cluster.nodes[name].alive and len(self.alive("")) > 1:
            self.cluster.kill(name)

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        if not self.cluster.nodes[name].alive:
            self.cluster.start(name)

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 5))
    def cut(self, name: str, which: int) -> None:
        self.cluster.nodes[name].cut(which)

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from(["block", "control", "session"]))
    def delay(self, name: str, what: str) -> None:
        self.cluster.nodes[name].weather.delay(what)

    @rule(name=st.sampled_from(NAMES))
    def release(self, name: str) -> None:
        self.cluster.nodes[name].release()

    @rule(name=st.sampled_from(NAMES), fault=st.sampled_from([Fault.DROP, Fault.DUPLICATE, Fault.TRUNCATE]))
    def break_a_frame(self, name: str, fault: Fault) -> None:
        self.cluster.nodes[name].weather.strike("control", fault)

    @rule(name=st.sampled_from(NAMES), fault=st.sampled_from([Fault.DROP, Fault.DUPLICATE]))
    def break_a_block(self, name: str, fault: Fault) -> None:
        """Not truncated: a reliable transport delivers whole messages; a checksum is what would notice."""
        self.cluster.nodes[name].weather.strike("block", fault)

    @invariant()
    def no_transfer_touches_a_block_of_somebody_else(self) -> None:
        self.cluster.audit()

    def teardown(self) -> None:
        self.cluster.settle()
        self.cluster.assert_clean()


HandOffMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHandOffs = HandOffMachine.TestCase


def test_pair_hands_over_exactly() -> None:
    """The plain path, so that a failure of the random test has a simple neighbour."""
    cluster = ToyCluster()
    for name in NAMES:
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
    prefill, decode = cluster.start("p0"), cluster.start("d0")
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
