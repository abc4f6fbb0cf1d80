"""A transport inside one process: agents joined by a network object; deterministic when polled by hand.

It keeps UCX's contract where it matters to the agent: a send reads its block only when the message is delivered, a
message with no posted receive is a protocol error, a message shorter than the block completes the receive and a longer
one fails it.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable

from kvbaton.kvtransfer.transport import BlockMemory, Channel, Operation


class LoopbackOperation:
    def __init__(self) -> None:
        self.completed = False
        self.error: str | None = None

    def complete(self, error: str | None = None) -> None:
        self.completed = True
        self.error = error


class LoopbackNetwork:
    """Knows every transport by its port. One lock guards all of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._ports = itertools.count(1)
        self._transports: dict[int, LoopbackTransport] = {}

    def register(self, transport: LoopbackTransport) -> int:
        port = next(self._ports)
        self._transports[port] = transport
        return port

    def unregister(self, port: int) -> None:
        self._transports.pop(port, None)

    def find(self, port: int) -> LoopbackTransport | None:
        return self._transports.get(port)


class LoopbackTransport:
    host = "loopback"

    def __init__(self, network: LoopbackNetwork, memory: BlockMemory, max_frame_bytes: int = 2 << 20) -> None:
        self.network = network
        self.memory = memory
        self.max_frame_bytes = max_frame_bytes
        self.port = network.register(self)
        self._channels: list[LoopbackChannel] = []
        self._accepted: deque[LoopbackChannel] = deque()
        self._woken = threading.Event()

    def open(self) -> None:
        """Nothing to set up."""

    def connect(self, host: str, port: int) -> Channel:
        with self.network.lock:
            channel = LoopbackChannel(self)
            self._channels.append(channel)
            target = self.network.find(port)
            if target is None:
                channel.lose(f"connection refused by {host}:{port}")
            else:
                channel.join(target.take(LoopbackChannel(target)))
            return channel

    def take(self, channel: LoopbackChannel) -> LoopbackChannel:
        """A peer's connection arrives."""
        self._channels.append(channel)
        self._accepted.append(channel)
        self.wake()
        return channel

    def accept(self) -> Channel | None:
        return self._accepted.popleft() if self._accepted else None

    def progress(self) -> Iterable[Channel]:
        with self.network.lock:
            self._channels = [c for c in self._channels if not c.closed]
            for channel in self._channels:
                channel.deliver()
            return tuple(self._channels)

    def wait(self, timeout_s: float) -> None:
        self._woken.wait(timeout_s)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        with self.network.lock:
            self.network.unregister(self.port)
            for channel in self._channels:
                channel.close()


class LoopbackChannel:
    """One end of a connection."""

    def __init__(self, transport: LoopbackTransport) -> None:
        self.closed = False
        self._transport = transport
        self._peer: LoopbackChannel | None = None
        self._inbox: deque[bytes] = deque()
        self._receives: dict[int, tuple[int, LoopbackOperation]] = {}
        self._arriving: deque[tuple[int, int | None, LoopbackOperation]] = deque()
        self._lost: str | None = None
        self._established = False

    @property
    def writable_blocks(self) -> list[int]:
        """Blocks of this end with a posted receive."""
        return [block for block, _ in self._receives.values()]

    @property
    def readable_blocks(self) -> list[int]:
        """Blocks of this end that are on their way to the peer."""
        on_their_way = [] if self._peer is None or self.closed else self._peer._arriving
        return [block for _, block, _ in on_their_way if block is not None]

    def hear(self, data: bytes) -> None:
        """A frame arrives here, as if the peer had sent it."""
        self._inbox.append(data)

    def join(self, peer: LoopbackChannel) -> None:
        self._peer, peer._peer = peer, self

    def local_blob(self) -> bytes:
        return b"loopback"

    def establish(self, peer_blob: bytes) -> None:
        self._established = True

    def send(self, data: bytes) -> None:
        with self._transport.network.lock:
            if self._peer is not None and self._lost is None:
                self._peer.hear(data)
                self._peer._transport.wake()

    def receive(self) -> bytes | bytearray | None:
        if not self._inbox or self.closed:
            return None
        data = self._inbox.popleft()
        if len(data) > self._transport.max_frame_bytes:
            self.lose(f"control frame of {len(data)} bytes is over the limit of {self._transport.max_frame_bytes}")
            return None
        return data

    def post_receive(self, tag: int, block_id: int) -> Operation:
        with self._transport.network.lock:
            operation = LoopbackOperation()
            self._receives[tag] = (block_id, operation)
            return operation

    def post_send(self, tag: int, block_id: int) -> Operation:
        return self._post(tag, block_id)

    def post_abort(self, tag: int) -> Operation:
        return self._post(tag, None)

    def failure(self, operation: Operation) -> str | None:
        return operation.error if isinstance(operation, LoopbackOperation) else None

    def lost(self) -> str | None:
        return self._lost

    def probe(self) -> str | None:
        return self._lost

    def describe(self) -> str:
        return "loopback"

    def close(self) -> None:
        with self._transport.network.lock:
            if self.closed:
                return
            self.closed = True
            self._receives.clear()
            self._arriving.clear()
            if self._peer is not None:
                self._peer._arriving.clear()
                self._peer.lose("closed by the peer")

    def lose(self, reason: str) -> None:
        """The connection breaks here."""
        self._lost = self._lost or reason
        self._transport.wake()

    def deliver(self) -> None:
        """Write what has arrived into the posted blocks."""
        while self._arriving and self._peer is not None and self._established:
            tag, block_id, sent = self._arriving.popleft()
            if tag not in self._receives:
                self.lose(f"block message with unknown tag {tag:#x}")
                return
            landing_block, received = self._receives.pop(tag)
            received.complete(self._write(block_id, landing_block))
            sent.complete()

    def _post(self, tag: int, block_id: int | None) -> Operation:
        with self._transport.network.lock:
            operation = LoopbackOperation()
            if self._peer is not None and self._lost is None:
                self._peer._arriving.append((tag, block_id, operation))
                self._peer._transport.wake()
            return operation

    def _write(self, source_block: int | None, landing_block: int) -> str | None:
        if source_block is None or self._peer is None:
            return None
        source = memoryview(self._peer._transport.memory.block(source_block)).cast("B")
        target = memoryview(self._transport.memory.block(landing_block)).cast("B")
        if len(source) > len(target):
            return f"message of {len(source)} bytes is longer than the block of {len(target)}"
        target[: len(source)] = source
        return None
