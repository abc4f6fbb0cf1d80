"""What the kvtransfer tests share: block memory of bytes, a hand-moved clock, and pairs of agents polled by hand."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvbaton.kvtransfer.agent import TransferAgent
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import (
    Event,
    Failed,
    Granted,
    HandoffKey,
    Landed,
    Landing,
    Offer,
    Offered,
    PeerAddress,
    Released,
)
from kvbaton.kvtransfer.open_handoffs import OpenHandoffs
from kvbaton.kvtransfer.session import Session
from kvbaton.kvtransfer.sessions import Sessions
from kvbaton.kvtransfer.transport import Transport
from support.loopback import LoopbackNetwork, LoopbackTransport

SECRET = b"a cluster secret"
FIELDS = (("model", "tiny"), ("dtype", "float32"), ("block_bytes", "64"))


class ByteBlocks:
    """BlockMemory over one numpy array."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.array = np.zeros((num_blocks, block_bytes), np.uint8)

    @property
    def num_blocks(self) -> int:
        return int(self.array.shape[0])

    @property
    def block_bytes(self) -> int:
        return int(self.array.shape[1])

    def block(self, block_id: int) -> np.ndarray:
        return self.array[block_id]

    def fill(self, seed: int) -> None:
        self.array[:] = np.random.default_rng(seed).integers(0, 256, self.array.shape, np.uint8)

    def digest(self, block_id: int) -> str:
        return hashlib.blake2b(self.array[block_id].tobytes(), digest_size=8).hexdigest()


class HandClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Engine:
    """An agent with its memory and the events that it has reported."""

    memory: ByteBlocks
    transport: Transport
    agent: TransferAgent
    events: list[Event] = field(default_factory=list)

    def poll(self) -> bool:
        return self.agent.poll()

    def take(self) -> list[Event]:
        taken, self.events[:] = list(self.events), []
        return taken


@dataclass(frozen=True)
class EngineOptions:
    generation: int = 1
    secret: bytes = SECRET
    fields: tuple[tuple[str, str], ...] = FIELDS
    settings: TransferConfig = field(default_factory=TransferConfig)
    num_blocks: int = 32
    block_bytes: int = 64


class BareEngine:
    """An engine's sessions with no agent above them: a test says what goes over them, true or not."""

    def __init__(self, rig: Rig, name: str, options: EngineOptions) -> None:
        self.clock = rig.clock
        self.memory = ByteBlocks(options.num_blocks, options.block_bytes)
        self.transport = LoopbackTransport(rig.network, self.memory)
        self.address = PeerAddress(name, options.generation, self.transport.host, self.transport.port)
        self.events: list[Event] = []
        self.handoffs = OpenHandoffs(self.memory, None, self.events.append)
        self.sessions = Sessions(
            self.transport, self.address, options.secret, options.fields, options.settings, self.handoffs
        )

    def poll(self) -> bool:
        worked = self.sessions.poll(self.clock())
        self.sessions.tick(self.clock())
        return worked

    def to(self, peer: PeerAddress) -> Session:
        return self.sessions.to(peer, self.clock())

    def session_with(self, engine_id: str) -> Session:
        return next(s for s in self.sessions.snapshot() if s.peer is not None and s.peer.engine_id == engine_id)


class Rig:
    """Agents on one loopback network, polled by hand until nothing moves."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.network = LoopbackNetwork()
        self.engines: list[Engine | BareEngine] = []
        self.wrap: Callable[[Transport], Transport] = lambda transport: transport

    def engine(self, name: str, options: EngineOptions = EngineOptions()) -> Engine:
        memory = ByteBlocks(options.num_blocks, options.block_bytes)
        transport = self.wrap(LoopbackTransport(self.network, memory))
        return self.add(name, options, memory, transport)

    def add(self, name: str, options: EngineOptions, memory: ByteBlocks, transport: Transport) -> Engine:
        events: list[Event] = []
        agent = TransferAgent(
            memory,
            PeerAddress(name, options.generation, "", 0),
            transport,
            options.secret,
            options.fields,
            options.settings,
            events.append,
            self.clock,
        )
        engine = Engine(memory, transport, agent, events)
        self.engines.append(engine)
        return engine

    def bare(self, name: str, options: EngineOptions = EngineOptions()) -> BareEngine:
        engine = BareEngine(self, name, options)
        self.engines.append(engine)
        return engine

    def settle(self) -> None:
        """Poll every engine until a whole round does nothing."""
        idle = 0
        while idle < 3:
            worked = [e.poll() for e in self.engines]
            idle = 0 if any(worked) else idle + 1

    def advance(self, seconds: float, step_s: float = 0.25) -> None:
        """Move the clock in steps, polling at each."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + step_s)
            self.settle()

    def assert_nothing_held(self) -> None:
        """Conservation: no hand-off is open and no block is quarantined or landing anywhere."""
        for engine in self.engines:
            if isinstance(engine, BareEngine):
                continue
            stats = engine.agent.stats()
            assert (stats.sending, stats.receiving, stats.quarantined_blocks) == (0, 0, 0), stats


def key(name: str = "r", epoch: int = 0) -> HandoffKey:
    return HandoffKey(name, epoch)


def offer(num_blocks: int, name: str = "r", epoch: int = 0) -> Offer:
    return Offer(key(name, epoch), num_blocks * 16, num_blocks)


def kinds(events: list[Event]) -> list[type]:
    return [type(e) for e in events]


def poll_until(agents: list[TransferAgent], done: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Real time, for UCX: the limit only ends a test that hangs."""
    end = time.monotonic() + limit_s
    while not done():
        for agent in agents:
            agent.poll()
        if time.monotonic() > end:
            raise AssertionError("nothing came within the limit")


__all__ = [
    "BareEngine",
    "Engine",
    "EngineOptions",
    "Failed",
    "Granted",
    "Landed",
    "Landing",
    "Offered",
    "Released",
    "Rig",
    "key",
    "kinds",
    "offer",
    "poll_until",
]
