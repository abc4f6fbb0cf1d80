"""A whole cluster in one thread: toy engines, real workers, real transfer agents on loopback, a hand-moved clock.

Nothing happens by itself: a test steps workers, polls agents and moves the clock in any order it likes. The ingress is
a model of the real one: it keeps prompt and tokens, drops duplicates, and resumes a request when its engine fails.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from kvbaton.cluster.host.inbox import Item
from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.orders import Abort, LegKind, Submit, Submitted
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenOutput
from kvbaton.kvtransfer.agent import TransferAgent
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import Event, PeerAddress
from support.faulty_transport import FaultyTransport
from support.loopback import LoopbackNetwork, LoopbackTransport
from support.net_weather import Weather, assert_only_owners_are_touched
from support.toy_engine import ToyEngine, expected_tokens

SESSION = 1
SECRET = b"toy secret"
BLOCK_SIZE = 4
DEFAULTS = TransferConfig()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Node:
    """One engine incarnation."""

    def __init__(
        self,
        name: str,
        generation: int,
        network: LoopbackNetwork,
        clock: Clock,
        num_blocks: int,
        settings: TransferConfig = DEFAULTS,
        engine: type[ToyEngine] = ToyEngine,
        secret: bytes = SECRET,
    ) -> None:
        self.name = name
        self.engine = engine(num_blocks, BLOCK_SIZE)
        self.weather = Weather()
        self.transport = FaultyTransport(LoopbackTransport(network, self.engine), self.weather, self.engine)
        self.inbox: deque[Item] = deque()
        self.heard: list[Event] = []  # everything that its transfer agent has said
        self.mail: deque[Item] = deque()  # what the ingress sent and the session still holds back
        identity = PeerAddress(name, generation, "loopback", 0)
        self.agent = TransferAgent(
            memory=self.engine,
            identity=identity,
            transport=self.transport,
            secret=secret,
            compatibility=(("model", "toy"),),
            settings=settings,
            on_event=self._hear,
            clock=clock,
        )
        self.transport.open()
        self.worker = Worker(self.engine, self.agent, BatchConfig(max_tokens_per_step=24, prefill_chunk_tokens=8))
        self.clock = clock
        self.alive = True

    @property
    def kv(self) -> KVManager:
        return self.engine.kv

    def _hear(self, event: Event) -> None:
        self.heard.append(event)
        self.inbox.append(event)

    @property
    def address(self) -> PeerAddress:
        return self.agent.address()

    def poll(self) -> bool:
        return self.alive and self.agent.poll()

    def step(self) -> list[TokenOutput]:
        """Inbox, then one engine step; what it published."""
        if not self.alive:
            return []
        while self.inbox:
            self.worker.handle(self.inbox.popleft(), self.clock())
        self.worker.step(self.clock())
        return [output for outputs in self.worker.take_outputs().values() for output in outputs]

    def die(self) -> None:
        """As SIGKILL: sockets close, nothing else happens here any more."""
        self.alive = False
        self.transport.close()

    def put(self, item: Item) -> None:
        """A command of the ingress; commands keep their order."""
        if self.alive:
            self.mail.append(item)
            if not self.weather.delays("session"):
                self.deliver()

    def deliver(self) -> None:
        while self.mail:
            self.inbox.append(self.mail.popleft())

    def release(self) -> None:
        """The weather clears, and what was held back arrives."""
        self.weather.clear()
        self.transport.release()
        self.deliver()

    def cut(self, which: int) -> None:
        """One of its connections breaks."""
        channels = [channel for channel in self.transport.channels.values() if channel.lost() is None]
        if channels:
            channels[which % len(channels)].inner.lose("cut by the test")  # type: ignore[attr-defined]

    def audit(self) -> None:
        """Every block has one owner that the engine's books know, and no transfer touches another's."""
        assert self.worker.audit().problems == (), self.name
        assert_only_owners_are_touched(self)

    def assert_clean(self) -> None:
        audit = self.worker.audit()
        assert (audit.problems, audit.held) == ((), 0), f"{self.name} holds blocks: {audit}"
        assert not self.worker.num_requests, f"{self.name} still has requests"
        assert not self.worker.handing_off, f"{self.name} has outgoing hand-offs"
        assert not self.worker.decode.arriving, f"{self.name} has landings"
        stats = self.agent.stats()
        assert (stats.sending, stats.receiving, stats.quarantined_blocks) == (0, 0, 0)


@dataclass
class Stream:
    """What the client of one request sees. `legs` are the engines that work on it now, by name."""

    request: Request  # as submitted last
    original: Request
    tokens: dict[int, list[int]]
    early: list[TokenOutput] = field(default_factory=list)
    done: dict[int, FinishReason] = field(default_factory=dict)
    aborted: bool = False
    legs: tuple[str, ...] = ()
    errors: list[tuple[str, str]] = field(default_factory=list)  # (engine, what it said), whether or not it mattered

    @property
    def over(self) -> bool:
        return self.aborted or len(self.done) == len(self.original.sample_indices)

    def assert_exact(self) -> None:
        """Tokens so far are a prefix of the fault-free run's, and all of it at the end."""
        sampling = self.original.sampling
        for sample, tokens in self.tokens.items():
            whole = expected_tokens(self.original.prompt, sampling.max_tokens, sampling.seed, sample)
            assert tokens == whole[: len(tokens)], f"{self.original.request_id} sample {sample}"
            if sample in self.done:
                assert tokens == whole


class ToyCluster:
    """Nodes by name, and streams by request id."""

    def __init__(self, num_blocks: int = 40, checksum: str = "off", engine: type[ToyEngine] = ToyEngine) -> None:
        self.clock = Clock()
        self.engine = engine
        self.network = LoopbackNetwork()
        self.num_blocks = num_blocks
        self.checksum = checksum
        self.nodes: dict[str, Node] = {}
        self.streams: dict[str, Stream] = {}
        self.generations: dict[str, int] = {}

    def start(self, name: str, secret: bytes = SECRET, **settings: object) -> Node:
        """Start an engine, or a new generation of one that died. `settings` are those of its transfer agent."""
        self.generations[name] = self.generations.get(name, 0) + 1
        transfer = TransferConfig(**({"checksum": self.checksum} | settings))  # type: ignore[arg-type]
        generation = self.generations[name]
        node = Node(name, generation, self.network, self.clock, self.num_blocks, transfer, self.engine, secret)
        self.nodes[name] = node
        return node

    def submit(self, name: str, prompt: tuple[int, ...], max_tokens: int, legs: tuple[str, ...], n: int = 1) -> Stream:
        """`legs` is (engine,) for a local request or (prefill, decode)."""
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n), tuple(range(n)))
        stream = Stream(request, request, {sample: [] for sample in request.sample_indices})
        self.streams[name] = stream
        self._send(stream, legs)
        return stream

    def abort(self, stream: Stream) -> None:
        stream.aborted = True
        self._abort_legs(stream)

    def kill(self, name: str) -> None:
        """The engine dies; its ingress sessions are lost at once, its peers find out by themselves."""
        self.nodes[name].die()
        for stream in self.streams.values():
            if name in stream.legs and not stream.over:
                self.resume(stream)

    def resume(self, stream: Stream) -> None:
        """Go on elsewhere with the first unfinished sample; the others follow one by one."""
        self._abort_legs(stream)
        live = [name for name, node in self.nodes.items() if node.alive]
        stream.early = []
        stream.legs = ()
        if not live:
            return
        unfinished = [s for s in stream.tokens if s not in stream.done]
        sample = unfinished[0]
        epoch = stream.request.epoch + 1
        stream.request = replace(
            stream.original, sample_indices=(sample,), emitted=tuple(stream.tokens[sample]), epoch=epoch
        )
        self._send(stream, (live[epoch % len(live)],))

    def step(self, name: str) -> None:
        for output in self.nodes[name].step():
            self._take(name, output)

    def settle(self, rounds: int = 4000) -> None:
        """Run everything until nothing is open; the clock moves, so that what only time can end ends too."""
        for turn in range(rounds):
            for name, node in list(self.nodes.items()):
                node.release()
                node.poll()
                self.step(name)
            for stream in self.streams.values():
                if not stream.over and not stream.legs:
                    self.resume(stream)
            if turn % 8 == 0:
                self.clock.now += 0.2
            if self.quiet():
                return
        raise AssertionError(f"never quiet: {[s for s in self.streams.values() if not s.over]}")

    def quiet(self) -> bool:
        nodes = [node for node in self.nodes.values() if node.alive]
        return all(stream.over for stream in self.streams.values()) and all(
            not node.inbox
            and not node.mail
            and node.worker.empty()
            and not (node.agent.stats().sending or node.agent.stats().receiving)
            for node in nodes
        )

    def audit(self) -> None:
        """What must hold at every moment."""
        for node in self.nodes.values():
            if node.alive:
                node.audit()

    def assert_clean(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.assert_clean()
        for stream in self.streams.values():
            stream.assert_exact()

    def _send(self, stream: Stream, legs: tuple[str, ...]) -> None:
        stream.legs = legs
        if len(legs) == 1:
            self.nodes[legs[0]].put(Submitted(SESSION, Submit(stream.request, LegKind.LOCAL)))
            return
        prefill, decode = legs
        self.nodes[decode].put(Submitted(SESSION, Submit(stream.request, LegKind.DECODE, self.nodes[prefill].address)))
        self.nodes[prefill].put(Submitted(SESSION, Submit(stream.request, LegKind.PREFILL, self.nodes[decode].address)))

    def _abort_legs(self, stream: Stream) -> None:
        for name in stream.legs:
            self.nodes[name].put(Abort(SESSION, stream.request.request_id))

    def _take(self, name: str, output: TokenOutput) -> None:
        stream = self.streams[output.request_id]
        if output.finish is FinishReason.ERROR:
            stream.errors.append((name, output.error or ""))
        if stream.over or output.epoch != stream.request.epoch or output.sample in stream.done:
            return
        if output.finish is FinishReason.ERROR:
            decoding = len(stream.legs) == 2 and name == stream.legs[0] and self._decoded(stream)
            if not decoding:
                self.resume(stream)
            return
        stream.early.append(output)
        self._deliver(stream)
        if stream.over:
            self._end_decode_leg(stream)
        elif all(s in stream.done for s in stream.request.sample_indices):
            self._end_decode_leg(stream)
            self.resume(stream)  # the other samples of a request that was resumed

    def _end_decode_leg(self, stream: Stream) -> None:
        """A decode engine that never got to decode is told, since the word of prefill may be lost on the way."""
        if len(stream.legs) == 2 and not self._decoded(stream):
            self.nodes[stream.legs[1]].put(Abort(SESSION, stream.request.request_id))

    def _decoded(self, stream: Stream) -> bool:
        """Whether decode has sent a token: what prefill says of the hand-off then no longer matters."""
        return any(len(tokens) > len(stream.request.emitted) + 1 for tokens in stream.tokens.values())

    def _deliver(self, stream: Stream) -> None:
        for output in sorted(stream.early, key=lambda o: o.index):
            tokens = stream.tokens[output.sample]
            if output.index == len(tokens) and output.token_id is not None:
                tokens.append(output.token_id)
                stream.early.remove(output)
                if output.finish is not None:
                    stream.done[output.sample] = output.finish
