"""A request ends early in every state that it can be in, whoever ends it: both legs give everything back."""

from __future__ import annotations

import pytest

from kvbaton.cluster.client.api import Cancelled, DeadlineExceeded, Overloaded
from kvbaton.cluster.client.client import ClientConfig
from kvbaton.decode_worker.incoming import IncomingState
from kvbaton.engine.outgoing import OutgoingState
from kvbaton.router.engine_info import Role
from support.client_support import Stream, cluster
from support.session_support import make_request
from support.toy_service import ToyService, ToyStream
from support.worker_bench import squeeze

PROMPT = tuple(range(1, 30))
STATES = (
    "queued",
    "prefilling",
    "computed",
    "offered",
    "waiting",
    "granted",
    "transferring",
    "landed",
    "running",
    "preempted",
    "parked",
)
FULL = 36  # of 40 blocks


class Stage:
    """One prefill engine, one decode engine, and a request on its way from one to the other."""

    def __init__(self) -> None:
        self.service = ToyService(num_blocks=40)
        self.p = self.service.start("p0", Role.PREFILL)
        self.d = self.service.start("d0", Role.DECODE)
        self.taken: dict[str, list[int]] = {}

    def fill(self, name: str) -> None:
        """Somebody else has nearly every block."""
        self.taken[name] = self.service.nodes[name].engine.kv.allocate(FULL)

    def empty(self) -> None:
        for name, blocks in self.taken.items():
            self.service.nodes[name].engine.kv.release(blocks)
        self.taken.clear()

    async def reach(self, state: str) -> ToyStream:
        if state == "queued":
            self.fill("p0")
        if state == "waiting":
            self.fill("d0")
        stream = await self.service.submit("a", PROMPT, 30, timeout_s=1000.0)
        self.service.step("d0")
        self.service.step("p0")
        if state in ("queued", "prefilling"):
            return stream
        if state == "parked":
            self.service.kill("p0")
            self.service.kill("d0")
            await self.service.breathe()
            return stream
        for _ in range(4):
            self.service.step("p0")
        if state == "computed":
            return stream
        self.poll_until_heard()  # the handshake, and the offer
        if state == "offered":
            return stream
        self.service.step("d0")
        self.d.poll()
        if state in ("waiting", "granted"):
            return stream
        self.p.poll()
        if state == "transferring":
            return stream
        self.poll_until_heard()
        self.service.step("d0")
        if state == "landed":
            return stream
        for _ in range(5):
            await self.service.run()
        if state == "preempted":
            squeeze(self.d.engine, self.d.worker, self.service.clock.now)
        return stream

    def poll_until_heard(self) -> None:
        """Until the decode engine's agent has something to say."""
        for _ in range(40):
            if self.d.inbox:
                return
            self.p.poll()
            self.d.poll()
        raise AssertionError("nothing has come")

    def check(self, state: str) -> None:
        """That it is where the test wants it."""
        outgoing = self.p.worker.prefill.outgoing.states()
        landing = self.d.worker.decode.arrivals.incoming.states()
        if state in ("queued", "prefilling"):
            assert self.p.worker.prefill.waiting == 1
            assert outgoing == ([] if state == "queued" else [OutgoingState.OPEN])
        elif state in ("computed", "offered", "waiting", "granted", "transferring"):
            wanted = {"waiting": IncomingState.WAITING, "granted": IncomingState.GRANTED}
            wanted["transferring"] = IncomingState.GRANTED
            assert outgoing == [OutgoingState.SENT]
            assert landing == [wanted.get(state, IncomingState.EXPECTED)]
        elif state != "parked":
            assert landing == []
            assert len(self.d.worker.decode.scheduler.running) == (state != "preempted")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", ["client leaves", "cancelled by name", "time is up at the engines"])
async def test_request_ends_in_every_state(state: str, event: str) -> None:
    stage = Stage()
    service = stage.service
    stream = await stage.reach(state)
    stage.check(state)
    if event == "client leaves":
        stream.cancel()
    elif event == "cancelled by name":
        assert service.client.cancel("a")
    else:  # the ingress is frozen: nothing that it could say arrives
        service.clock.now += 1002
        for session in service.sessions.values():
            session.connected = False
    await service.breathe()
    for _ in range(60):
        for node in (stage.p, stage.d):
            if node.alive:
                node.poll()
                service.step(node.name)
        service.clock.now += 0.05
    stage.empty()
    for node in (stage.p, stage.d):
        if node.alive:
            node.assert_clean()
    if event == "cancelled by name":
        assert isinstance(stream.task.exception(), Cancelled)
    stream.cancel()
    await service.breathe()
    stream.assert_exact() if event != "cancelled by name" else None
    assert service.client.in_flight == 0


async def test_unknown_request_cannot_be_cancelled() -> None:
    service = ToyService()
    assert service.client.cancel("nobody") is False


async def test_deadline_aborts_both_legs_and_names_itself() -> None:
    async with cluster(client_config=ClientConfig(request_timeout_s=0.05)) as c:
        request = make_request()
        stream = Stream(c.client, request)
        assert 0 < (await c["p0"].next_submit()).request.timeout_s <= 0.05  # type: ignore[operator]
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await stream.end()
        for name in ("p0", "d0"):
            assert await c[name].aborted() == ("r1", None)
        assert c.client.counters.timed_out == 1


async def test_deadline_runs_on_while_nobody_serves() -> None:
    """Guards a request that waits, parked, for longer than it may."""
    async with cluster(client_config=ClientConfig(request_timeout_s=0.2, park_s=60)) as c:
        stream = Stream(c.client, make_request())
        await c["p0"].next_submit()
        for name in ("p0", "d0"):
            await c[name].kill()
        with pytest.raises(DeadlineExceeded):
            await stream.end()


async def test_requests_beyond_the_cap_are_refused_at_once() -> None:
    async with cluster(client_config=ClientConfig(max_in_flight=1)) as c:
        first = Stream(c.client, make_request("one"))
        await c["p0"].next_submit()
        with pytest.raises(Overloaded):
            await Stream(c.client, make_request("two")).end()
        first.task.cancel()
        await c["p0"].aborted()
