"""The real cluster client and router over toy nodes, in one thread: sessions are queues that a test empties by hand.

Engines are those of `toy_cluster`; what is between them and the client is only when things arrive: each node's answers
wait in its `downlink` until the test delivers them, so that any two engines' words can overtake each other.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import replace

from kvbaton.cluster.client.client import ClientConfig, ClusterClient
from kvbaton.cluster.session.client import SessionLost
from kvbaton.engine.orders import Abort, Migrate, MigrationOrdered, Notice, Submit, Submitted
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenOutput
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.loopback import LoopbackNetwork
from support.net_weather import assert_only_owners_are_touched
from support.toy_cluster import BLOCK_SIZE, SECRET, Clock, Node
from support.toy_engine import ToyEngine, expected_tokens


class ToySession:
    """What the client sees of one connection to one engine incarnation."""

    def __init__(self, session_id: int, node: Node, info: EngineInfo) -> None:
        self.session_id = session_id
        self.node = node
        self.info = info
        self.connected = True
        self.downlink: deque[tuple[list[TokenOutput], EngineLoad, list[Notice]]] = deque()

    def submit(self, submit: Submit) -> None:
        if not self.connected:
            raise SessionLost("no session")
        self.node.put(Submitted(self.session_id, submit))

    def abort(self, request_id: str, sample: int | None = None) -> None:
        if self.connected:
            self.node.put(Abort(self.session_id, request_id, sample))

    def migrate(self, order: Migrate) -> None:
        if self.connected:
            self.node.put(MigrationOrdered(self.session_id, order))


class ToyStream:
    """Reads one `generate` and keeps what came."""

    def __init__(self, client: ClusterClient, request: Request) -> None:
        self.request = request
        self.tokens: dict[int, list[int]] = {sample: [] for sample in request.sample_indices}
        self.done: dict[int, FinishReason] = {}
        self.cancelled = False
        self.cut: set[int] = set()  # samples that the reader wants no more of
        self._generator = client.generate(request)
        self.task = asyncio.ensure_future(self._read())

    @property
    def over(self) -> bool:
        return self.task.done()

    def cancel(self) -> None:
        """The client leaves."""
        self.cancelled = True
        self.task.cancel()

    def assert_exact(self) -> None:
        """Tokens so far are a prefix of the fault-free run's, all of it at the end; no stream ended with an error."""
        if self.over and not self.cancelled:
            self.task.result()
            assert self.done.keys() | self.cut == self.tokens.keys(), "a stream ended before its samples did"
        sampling = self.request.sampling
        for sample, tokens in self.tokens.items():
            whole = expected_tokens(self.request.prompt, sampling.max_tokens, sampling.seed, sample)
            assert tokens == whole[: len(tokens)], f"{self.request.request_id} sample {sample}"
            assert sample not in self.done or tokens == whole

    async def _read(self) -> None:
        try:
            async for outputs in self._generator:
                for output in outputs:
                    assert output.sample not in self.done, "a token after the end"
                    assert output.index == len(self.tokens[output.sample]), "a token is missing or doubled"
                    assert output.token_id is not None
                    self.tokens[output.sample].append(output.token_id)
                    if output.finish is not None:
                        self.done[output.sample] = output.finish
        finally:
            await self._generator.aclose()


class ToyService:
    """`start` engines, `submit`, then move everything by hand or `settle`."""

    def __init__(self, num_blocks: int = 40, checksum: str = "off", engine: type[ToyEngine] = ToyEngine) -> None:
        self.clock = Clock()
        self.engine = engine
        self.num_blocks = num_blocks
        self.checksum = checksum
        self.network = LoopbackNetwork()
        self.nodes: dict[str, Node] = {}
        self.streams: dict[str, ToyStream] = {}
        self.sessions: dict[str, ToySession] = {}  # stand for `EngineLinks`
        self.router = Router(RouterConfig(local_prefill_max_tokens=0), self.clock, random.Random(0))
        config = ClientConfig(max_resumes=100, park_s=1e6)
        self.client = ClusterClient(None, self.router, SECRET, "toy", config)  # type: ignore[arg-type]
        self._generations: dict[str, int] = {}
        self._session_ids = iter(range(1, 1 << 30))

    def start(self, name: str, role: Role, num_blocks: int | None = None) -> Node:
        """Start an engine, or a new generation of one that died."""
        self._generations[name] = self._generations.get(name, 0) + 1
        blocks = num_blocks or self.num_blocks
        settings = TransferConfig(checksum=self.checksum)
        node = Node(name, self._generations[name], self.network, self.clock, blocks, settings, self.engine)
        self.nodes[name] = node
        address = node.address
        info = EngineInfo(
            name,
            address.generation,
            role,
            EngineState.READY,
            "h",
            1,
            address.port,
            "toy",
            4096,
            BLOCK_SIZE,
            blocks,
            512,
            node.worker.max_requests,
        )
        self._connect(node, replace(info, host=address.host))
        return node

    def _connect(self, node: Node, info: EngineInfo) -> None:
        session = ToySession(next(self._session_ids), node, info)
        self.sessions[node.name] = session
        self.client.connected(session, info, node.worker.load(0.0))  # type: ignore[arg-type]

    def kill(self, name: str) -> None:
        self.nodes[name].die()
        self._lose(name)
        self.client.removed(name)

    def reconnect(self, name: str) -> None:
        """The session breaks and comes back; the engine lives."""
        session = self.sessions[name]
        self._lose(name)
        self.nodes[name].put(Abort(session.session_id, None))
        self._connect(session.node, session.info)

    def _lose(self, name: str) -> None:
        session = self.sessions[name]
        if session.connected:
            session.connected = False
            self.client.lost(session, "lost by the test")  # type: ignore[arg-type]

    def set_state(self, name: str, state: EngineState) -> None:
        """What the registry says of an engine."""
        session = self.sessions[name]
        session.info = replace(session.info, state=state)
        self.client.changed(session.info)

    async def submit(
        self, name: str, prompt: tuple[int, ...], max_tokens: int, n: int = 1, timeout_s: float | None = None
    ) -> ToyStream:
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        request = Request(name, prompt, sampling, tuple(range(n)), timeout_s=timeout_s)
        stream = self.streams[name] = ToyStream(self.client, request)
        await self.breathe()
        return stream

    def where(self, name: str, sample: int = 0) -> str | None:
        """The engine that decodes a sample, None while nobody does."""
        attempt = self.client.attempts.working_on(name, sample)
        return None if attempt is None or not attempt.decodes(sample) else attempt.second.info.engine_id

    def step(self, name: str) -> None:
        """One engine step; its answers wait in the downlink."""
        node, session = self.nodes[name], self.sessions.get(name)
        if not node.alive or session is None:
            return
        while node.inbox:
            node.worker.handle(node.inbox.popleft(), self.clock())
        node.worker.step(self.clock())
        assert_only_owners_are_touched(node)
        outputs = node.worker.take_outputs().get(session.session_id, [])
        notices = [notice for sid, notice in node.worker.take_notices() if sid == session.session_id]
        session.downlink.append((outputs, node.worker.load(0.01), notices))

    async def deliver(self, name: str) -> None:
        """What an engine has said arrives."""
        session = self.sessions.get(name)
        while session is not None and session.connected and session.downlink:
            outputs, load, notices = session.downlink.popleft()
            self.client.step(session, outputs, load)  # type: ignore[arg-type]
            for notice in notices:
                self.client.notice(session, notice)  # type: ignore[arg-type]
        await self.breathe()

    async def run(self, times: int = 1) -> None:
        """Everything moves, in order."""
        for _ in range(times):
            for name, node in list(self.nodes.items()):
                node.poll()
                self.step(name)
                await self.deliver(name)

    async def until(self, condition: object, rounds: int = 400) -> None:
        for _ in range(rounds):
            if condition():  # type: ignore[operator]
                return
            await self.run()
        raise AssertionError("it never came to that")

    async def breathe(self) -> None:
        """Let the readers read."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def settle(self, rounds: int = 3000) -> None:
        """Until every stream is over and nothing is held; the clock moves, so that what only time can end ends."""
        for turn in range(rounds):
            for node in self.nodes.values():
                if node.alive:
                    node.release()
            await self.run()
            if turn % 8 == 0:
                self.clock.now += 0.2
            if self.quiet():
                return
        held = {name: node.worker.audit() for name, node in self.nodes.items() if node.alive}
        raise AssertionError(f"never quiet: {[name for name, s in self.streams.items() if not s.over]} {held}")

    def quiet(self) -> bool:
        return all(stream.over for stream in self.streams.values()) and all(
            not node.inbox
            and not node.mail
            and node.worker.empty()
            and not (node.agent.stats().sending or node.agent.stats().receiving)
            for node in self.nodes.values()
            if node.alive
        )

    def audit(self) -> None:
        """What must hold at every moment."""
        for node in self.nodes.values():
            if node.alive:
                node.audit()

    def assert_clean(self) -> None:
        for stream in self.streams.values():
            stream.assert_exact()
        for node in self.nodes.values():
            if node.alive:
                node.assert_clean()
        assert self.client.in_flight == 0
        assert len(self.client.attempts) == 0
        assert len(self.client.migrations) == 0
        for info in self.router.engines:
            view = self.router.view(info.engine_id)
            assert view is not None
            assert (view.own_prefill_tokens, view.own_requests, view.own_context_tokens, view.own_legs) == (
                0,
                0,
                0,
                0,
            ), info.engine_id
