"""A HandoffLink that records: the state machines' other half in their unit tests."""

from __future__ import annotations

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.messages import Event
from kvbaton.kvtransfer.send_window import BlockSource
from kvbaton.kvtransfer.transport import Operation
from kvbaton.kvtransfer.wire import BLOCK_TAG, Handle, Message

FIRST_TAG = BLOCK_TAG + 100


class Receive:
    """A posted receive that the test completes."""

    def __init__(self, tag: int, block_id: int) -> None:
        self.tag, self.block_id = tag, block_id
        self.completed = False
        self.error: str | None = None

    def complete(self, error: str | None = None) -> None:
        self.completed, self.error = True, error


class RecordingLink:
    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.events: list[Event] = []
        self.queue: list[int] = []
        self.receives: list[Receive] = []
        self.forgotten: list[Handle] = []
        self.connected = True
        self.num_received = 0
        self.num_drains = 0
        self.sums: BlockSums | None = None

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def queue_block(self, source: BlockSource, index: int) -> None:
        self.queue.append(index)

    def first_tag(self, handle: Handle, count: int) -> int:
        return FIRST_TAG

    def post_receive(self, tag: int, block_id: int) -> Operation:
        self.receives.append(Receive(tag, block_id))
        return self.receives[-1]

    def failure(self, operation: Operation) -> str | None:
        assert isinstance(operation, Receive)
        return operation.error

    def received(self, count: int) -> None:
        self.num_received += count

    def alive(self) -> bool:
        return self.connected

    def drains(self) -> None:
        self.num_drains += 1

    def forget(self, handle: Handle) -> None:
        self.forgotten.append(handle)

    def sent_kinds(self) -> list[str]:
        return [type(m).__name__.removesuffix("Message") for m in self.sent]
