"""Random interleavings of everything that can happen to requests, hand-offs and engines, on a hand-moved clock.

After each run: every request ended exactly once with the tokens of the fault-free run, no block is held anywhere, and
no hand-off is open on either side.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

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
    )
    def submit(self, length: int, max_tokens: int, n: int, choice: int) -> None:
        prefill, decode = self.alive("p"), self.alive("d")
        if not prefill + decode:
            return
        prompt = tuple((self.count % 5 * 13 + i * 7) % 997 for i in range(length))
        if prefill and decode and choice < 6:
            legs: tuple[str, ...] = (prefill[choice % len(prefill)], decode[choice // 2 % len(decode)])
        else:
            legs = ((prefill + decode)[choice % len(prefill + decode)],)
        self.cluster.submit(f"r{self.count}", prompt, max_tokens, legs, n)
        self.count += 1

    @rule(name=st.sampled_from(NAMES), times=st.integers(1, 4))
    def step(self, name: str, times: int) -> None:
        for _ in range(times):
            self.cluster.step(name)

    @rule(name=st.sampled_from(NAMES))
    def poll(self, name: str) -> None:
        self.cluster.nodes[name].poll()

    @rule(times=st.integers(1, 6))
    def run_all(self, times: int) -> None:
        for _ in range(times):
            for name in NAMES:
                self.cluster.nodes[name].poll()
                self.cluster.step(name)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        stream = self.cluster.streams[f"r{which % self.count}"]
        if not stream.over:
            self.cluster.abort(stream)

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
        channels = self.cluster.nodes[name].transport._channels
        if channels:
            channels[which % len(channels)].lose("cut by the test")

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
