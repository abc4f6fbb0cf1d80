"""Every failure of a hand-off is told: the peer gets CANCEL or FAIL, the ingress a named reason, and it needs no timer.

The clock stands still: only what engines and agents do at once counts. What the ingress has to say to the peer does not
arrive, so that the peer has it from the other engine. Afterwards the request is resumed with its exact tokens, and
nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvbaton.cluster.host.worker import SubmitCheck
from kvbaton.engine.orders import Abort, LegKind, Submit, Submitted
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.kvtransfer.messages import Failed, Landing, Offered
from support.faulty_transport import Fault
from support.toy_cluster import SESSION, ToyCluster

PROMPT = tuple(range(1, 30))  # 8 blocks
ROUNDS = 40


class Scene:
    """Engines p and d, and a request that p hands to d: both were submitted their legs, and nothing has run yet."""

    def __init__(self, both: str = "off", **of_d: object) -> None:
        """`both` is the checksum of both engines, `of_d` are settings of one."""
        self.cluster = ToyCluster(checksum=both)
        self.p = self.cluster.start("p")
        self.d = self.cluster.start("d", **of_d)  # type: ignore[arg-type]
        self.stream = self.cluster.submit("a", PROMPT, 12, ("p", "d"))

    def turn(self) -> None:
        for name in ("p", "d"):
            self.cluster.nodes[name].poll()
            self.cluster.step(name)
        self.cluster.audit()

    def until_offered(self) -> None:
        """d's agent has the offer, d has not looked at it."""
        for _ in range(ROUNDS):
            self.p.poll()
            self.cluster.step("p")
            self.d.poll()
            if any(isinstance(event, Offered) for event in self.d.inbox):
                return
        raise AssertionError("no offer came")

    def until_landing(self) -> None:
        """d has granted, every block is on its way and none has come."""
        self.p.weather.delay("block")
        for _ in range(6):
            self.turn()
        assert self.d.worker.decode.arriving == self.p.worker.handing_off == 1

    def failures(self, name: str) -> list[str]:
        return [event.reason for event in self.cluster.nodes[name].heard if isinstance(event, Failed)]


@dataclass(frozen=True)
class Case:
    """`arrange` lets it fail. `peer`, who did not notice it first, hears `at_peer`; the ingress hears `at_ingress`."""

    arrange: Callable[[], Scene]
    peer: str
    at_peer: str
    at_ingress: str = ""


def nobody_there() -> Scene:
    scene = Scene()
    scene.d.die()
    return scene


def replaced_at_its_address() -> Scene:
    scene = Scene()
    port = scene.d.address.port
    scene.d.die()
    scene.d = scene.cluster.start("d")
    scene.cluster.network._transports[port] = scene.d.transport._inner  # type: ignore[assignment]
    return scene


def other_prompt_at_decode() -> Scene:
    scene = Scene()
    scene.d.inbox.clear()
    other = Request("a", PROMPT[:9], SamplingParams(max_tokens=12), (0,))
    scene.d.put(Submitted(SESSION, Submit(other, LegKind.DECODE, scene.p.address)))
    return scene


def impossible_landing() -> Scene:
    scene = Scene()
    agent, grant = scene.d.agent, scene.d.agent.grant

    def short(key: object, landing: Landing) -> None:
        grant(key, Landing(landing.first_block, landing.block_ids[:-1]))  # type: ignore[arg-type]

    agent.grant = short  # type: ignore[method-assign, assignment]
    return scene


def impossible_tokens() -> Scene:
    scene = Scene()
    agent, finish = scene.p.agent, scene.p.agent.finish
    agent.finish = lambda key, payload: finish(key, b"\xc1")  # type: ignore[method-assign]
    return scene


def striking(name: str, what: str, fault: Fault, checksum: str = "off", offered: bool = False) -> Callable[[], Scene]:
    """The next frame or block that leaves `name`, or lands there, meets the fault."""

    def arrange() -> Scene:
        scene = Scene(checksum)
        if offered:
            scene.until_offered()
        scene.cluster.nodes[name].weather.strike(what, fault)
        return scene

    return arrange


def decode_full() -> Scene:
    """It refuses the request before prefill has begun it."""
    scene = Scene()
    scene.d.worker._check = SubmitCheck(max_tokens=100, vocab_size=1009, max_requests=0)
    scene.p.weather.delay("session")
    scene.cluster.step("d")
    return scene


def aborted(name: str, when: str) -> Callable[[], Scene]:
    """The ingress's abort reaches one engine alone."""

    def arrange() -> Scene:
        scene = Scene()
        if when == "offered":
            scene.until_offered()
        elif when == "landing":
            scene.until_landing()
        elif name == "d":
            scene.cluster.step("d")
        else:
            scene.cluster.step("p")
        scene.cluster.nodes[name].put(Abort(SESSION, "a"))
        for node in (scene.p, scene.d):
            node.weather.delay("session")
        return scene

    return arrange


def cut() -> Scene:
    scene = Scene()
    scene.until_landing()
    scene.d.cut(0)
    return scene


def prefill_dies() -> Scene:
    scene = Scene()
    scene.until_landing()
    scene.d.weather.delay("session")
    scene.cluster.kill("p")
    return scene


CASES = {
    "handshake, another secret": Case(lambda: Scene(secret=b"another"), "p", "authentication failed"),
    "handshake, another setting": Case(lambda: Scene(checksum="xxh3"), "p", "kvtransfer.checksum is"),
    "handshake, nobody there": Case(nobody_there, "p", "connection refused by loopback"),
    "handshake, replaced": Case(replaced_at_its_address, "p", "expected d generation 1, met d generation 2"),
    "handshake, broken frame": Case(striking("p", "control", Fault.TRUNCATE), "p", "protocol error"),
    "offer, too large": Case(lambda: Scene(max_blocks_per_handoff=4), "p", "offer refused: 8 blocks are more than 4"),
    "offer, other prompt": Case(other_prompt_at_decode, "p", "offer of 29 tokens in 8 blocks, expected 9 in 3"),
    "grant, impossible": Case(impossible_landing, "p", "landing of 0+7 blocks for 8"),
    "grant, broken frame": Case(
        striking("d", "control", Fault.TRUNCATE, offered=True), "d", "connection lost", "protocol error"
    ),
    "send": Case(striking("p", "block", Fault.FAIL), "d", "send failed: failed by the fault plan"),
    "receive": Case(striking("d", "landing", Fault.FAIL), "p", "receive failed: failed by the fault plan"),
    "checksum": Case(striking("d", "landing", Fault.CORRUPT, "xxh3"), "p", "checksum mismatch in block 0"),
    "admission, impossible": Case(impossible_tokens, "p", "hand-off refused"),
    "admission, no place": Case(decode_full, "p", "engine queue is full (0 requests)"),
    "abort at decode, early": Case(aborted("d", "early"), "p", "aborted"),
    "abort at decode, offered": Case(aborted("d", "offered"), "p", "aborted"),
    "abort at decode, landing": Case(aborted("d", "landing"), "p", "aborted"),
    "abort at prefill, early": Case(aborted("p", "early"), "d", "aborted"),
    "abort at prefill, offered": Case(aborted("p", "offered"), "d", "aborted"),
    "abort at prefill, landing": Case(aborted("p", "landing"), "d", "aborted"),
    "connection cut": Case(cut, "p", "connection lost"),
    "prefill dies": Case(prefill_dies, "d", "connection lost"),
}


@pytest.mark.parametrize("name", CASES)
def test_failure_is_told_to_peer_and_ingress_at_once(name: str) -> None:
    case = CASES[name]
    scene = case.arrange()
    scene.cluster.nodes[case.peer].weather.delay("session")
    for _ in range(ROUNDS):
        scene.turn()
    heard, told = scene.failures(case.peer), [text for _, text in scene.stream.errors]
    assert any(case.at_peer in reason for reason in heard), (heard, told)
    assert any((case.at_ingress or case.at_peer) in text for text in told), (heard, told)
    scene.cluster.settle()
    scene.cluster.assert_clean()
    assert scene.stream.done.keys() == {0}
