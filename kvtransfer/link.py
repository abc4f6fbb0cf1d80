"""What a hand-off's state machine needs of the session that it lives in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.messages import Event, HandoffKey
from kvbaton.kvtransfer.transport import Operation
from kvbaton.kvtransfer.wire import Handle, Message

if TYPE_CHECKING:
    from kvbaton.kvtransfer.sender import SendHandoff


def key_of(handle: Handle) -> HandoffKey:
    """The workers' name of a hand-off."""
    return HandoffKey(handle.request_id, handle.epoch)


class HandoffLink(Protocol):
    """Implemented by Session; a recording one drives the state machines in tests."""

    @property
    def sums(self) -> BlockSums | None:
        """How blocks are summed; None where they are not."""
        ...

    def send(self, message: Message) -> None:
        """Queue a control message to the peer."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the worker."""
        ...

    def queue_block(self, sender: SendHandoff, index: int) -> None:
        """Send block `index` of the prompt, or its abort, when the window has room (see SendHandoff.source)."""
        ...

    def post_receive(self, tag: int, block_id: int) -> Operation: ...

    def failure(self, operation: Operation) -> str | None: ...

    def received(self, count: int) -> None:
        """Counts completed receives."""
        ...

    def alive(self) -> bool:
        """Asks the connection itself, now: False once the peer has hung up."""
        ...

    def drains(self) -> None:
        """A hand-off waits for the peer to end its operations: asks for a sign of life, which comes at once."""
        ...

    def forget(self, handle: Handle) -> None:
        """The hand-off is RELEASED."""
        ...
