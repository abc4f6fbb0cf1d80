"""A transport that wraps another and breaks what a plan says.

Faults strike where a message leaves. A delayed control frame holds those behind it, since frames keep their order;
blocks are delayed one by one. A truncated block arrives as an empty message, which completes the receive as UCX does.
A corrupted block has one bit flipped where it lands. A failed operation is one that the transport reports as such: a
send that never left, a receive whose message did not fit.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from kvbaton.kvtransfer.transport import BlockMemory, Channel, Operation, Transport


class Fault(enum.Enum):
    PASS = "pass"
    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"
    FAIL = "fail"
    DIE = "die"


class FaultPlan(Protocol):
    """Decides for each message that leaves, and each block that lands; may be random, with its own seed."""

    def on_control(self, data: bytes) -> Fault: ...

    def on_block(self, tag: int) -> Fault: ...

    def on_landing(self, tag: int) -> Fault:
        """PASS, CORRUPT or FAIL."""
        ...


class DeferredOperation:
    """A send that the plan holds back, or has swallowed: it runs once it is given the real operation."""

    def __init__(self) -> None:
        self.inner: Operation | None = None

    @property
    def completed(self) -> bool:
        return self.inner is not None and self.inner.completed


class FailedOperation:
    """One that ends, with its `inner` one if there is one, and in failure."""

    def __init__(self, inner: Operation | None = None) -> None:
        self._inner = inner

    @property
    def completed(self) -> bool:
        return self._inner is None or self._inner.completed


class CorruptedReceive:
    """A receive whose block loses a bit between its arrival and the agent's first look at it."""

    def __init__(self, inner: Operation, block: memoryview) -> None:
        self.inner = inner
        self._block = block
        self._flipped = False

    @property
    def completed(self) -> bool:
        if self.inner.completed and not self._flipped:
            self._flipped = True
            self._block[len(self._block) // 2] ^= 1
        return self.inner.completed


class FaultyChannel:
    """Implements Channel over another one. `said` and `heard` are the frames that this end has sent and received."""

    def __init__(self, inner: Channel, plan: FaultPlan, memory: BlockMemory | None = None) -> None:
        self.inner = inner
        self._plan = plan
        self._memory = memory
        self._held_frames: deque[bytes] = deque()
        self._held_blocks: deque[tuple[int, int, DeferredOperation]] = deque()
        self._dead: str | None = None
        self.said: list[bytes] = []
        self.heard: list[bytes] = []

    @property
    def held_blocks(self) -> list[int]:
        """Blocks whose sends are delayed."""
        return [block for _, block, _ in self._held_blocks]

    def local_blob(self) -> bytes:
        return self.inner.local_blob()

    def establish(self, peer_blob: bytes) -> None:
        self.inner.establish(peer_blob)

    def send(self, data: bytes) -> None:
        self.said.append(data)
        fault = self._plan.on_control(data)
        if fault is Fault.DIE:
            self.die()
        elif fault is Fault.DELAY or self._held_frames:
            self._held_frames.append(data)
        elif fault is Fault.TRUNCATE:
            self.inner.send(data[: len(data) // 2])
        elif fault is not Fault.DROP:
            self.inner.send(data)
            if fault is Fault.DUPLICATE:
                self.inner.send(data)

    def receive(self) -> bytes | bytearray | None:
        data = None if self._dead else self.inner.receive()
        if data is not None:
            self.heard.append(bytes(data))
        return data

    def post_receive(self, tag: int, block_id: int) -> Operation:
        receive = self.inner.post_receive(tag, block_id)
        fault = Fault.PASS if self._memory is None else self._plan.on_landing(tag)
        if fault is Fault.FAIL:
            return FailedOperation(receive)
        if self._memory is None or fault is not Fault.CORRUPT:
            return receive
        return CorruptedReceive(receive, memoryview(self._memory.block(block_id)).cast("B"))

    def post_send(self, tag: int, block_id: int) -> Operation:
        fault = self._plan.on_block(tag)
        if fault is Fault.DIE:
            self.die()
        if fault is Fault.FAIL:
            return FailedOperation()
        if fault in (Fault.DROP, Fault.DELAY, Fault.DIE):
            held = DeferredOperation()
            if fault is Fault.DELAY:
                self._held_blocks.append((tag, block_id, held))
            return held
        if fault is Fault.TRUNCATE:
            return self.inner.post_abort(tag)
        if fault is Fault.DUPLICATE:
            self.inner.post_send(tag, block_id)
        return self.inner.post_send(tag, block_id)

    def post_abort(self, tag: int) -> Operation:
        return self.inner.post_abort(tag)

    def failure(self, operation: Operation) -> str | None:
        if isinstance(operation, FailedOperation):
            return "failed by the fault plan"
        if isinstance(operation, CorruptedReceive):
            return self.inner.failure(operation.inner)
        if isinstance(operation, DeferredOperation):
            return None if operation.inner is None else self.inner.failure(operation.inner)
        return self.inner.failure(operation)

    def lost(self) -> str | None:
        return self._dead or self.inner.lost()

    def probe(self) -> str | None:
        return self._dead or self.inner.probe()

    def describe(self) -> str:
        return self.inner.describe()

    def close(self) -> None:
        self._held_frames.clear()
        self._held_blocks.clear()
        self.inner.close()

    def release(self) -> None:
        """Send what was delayed."""
        while self._held_frames:
            self.inner.send(self._held_frames.popleft())
        while self._held_blocks:
            tag, block_id, held = self._held_blocks.popleft()
            held.inner = self.inner.post_send(tag, block_id)

    def die(self) -> None:
        """As if this process's end of the connection were cut."""
        self._dead = "cut by the fault plan"
        self.inner.close()


class FaultyTransport:
    """Implements Transport over another one; every channel obeys `plan`. `memory` is where it lands blocks."""

    def __init__(self, inner: Transport, plan: FaultPlan, memory: BlockMemory | None = None) -> None:
        self._inner = inner
        self._plan = plan
        self._memory = memory
        self.channels: dict[Channel, FaultyChannel] = {}

    @property
    def host(self) -> str:
        return self._inner.host

    @property
    def port(self) -> int:
        return self._inner.port

    def open(self) -> None:
        self._inner.open()

    def connect(self, host: str, port: int) -> Channel:
        return self._wrap(self._inner.connect(host, port))

    def accept(self) -> Channel | None:
        arrived = self._inner.accept()
        return None if arrived is None else self._wrap(arrived)

    def progress(self) -> Iterable[Channel]:
        self._inner.progress()
        return tuple(self.channels.values())

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()

    def release(self) -> None:
        """Send everything that was delayed, on every channel."""
        for channel in self.channels.values():
            channel.release()

    def _wrap(self, channel: Channel) -> FaultyChannel:
        wrapped = self.channels[channel] = FaultyChannel(channel, self._plan, self._memory)
        return wrapped
