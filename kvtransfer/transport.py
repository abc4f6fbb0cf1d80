"""The seam under the agent: block memory, and channels that carry control messages and blocks.

A transport and its channels are used on one thread, but for `wake`.

A channel starts in its handshake phase, in which `send` and `receive` carry handshake frames and no block may move.
Each side shows the other its `local_blob`; `establish(peer's blob)` opens the data path, and from then on `send` and
`receive` carry control frames, in order.

Ownership of blocks: an `Operation` touches its block until it is `completed`. `close` returns only when no operation
of the channel can touch any block any more, completed or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class TransportError(Exception):
    """The transport cannot do what was asked; the text says why."""


class BlockMemory(Protocol):
    """A KV pool seen as `num_blocks` numbered byte ranges of equal size, each contiguous."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def block(self, block_id: int) -> Any:
        """The block as an object with a buffer (CPU) or `__cuda_array_interface__` (GPU); no copy."""
        ...


class Operation(Protocol):
    """A block on its way in or out."""

    @property
    def completed(self) -> bool:
        """True when the block is no longer touched, whether it succeeded or not (see `Channel.failure`)."""
        ...


class Channel(Protocol):
    """One connection to one peer."""

    def local_blob(self) -> bytes:
        """What the peer's `establish` needs. Raises TransportError."""
        ...

    def establish(self, peer_blob: bytes) -> None:
        """Open the data path. Raises TransportError when the peer cannot be reached that way."""
        ...

    def send(self, data: bytes) -> None:
        """Queue one frame; frames arrive whole and in order, or the channel is lost."""
        ...

    def receive(self) -> bytes | bytearray | None:
        """The next frame, or None. Larger than the transport's cap = channel lost."""
        ...

    def post_receive(self, tag: int, block_id: int) -> Operation:
        """Receive the message `tag` into a block. `tag` is used once per channel."""
        ...

    def post_send(self, tag: int, block_id: int) -> Operation:
        """Send a block to the receive that the peer has posted under `tag`."""
        ...

    def post_abort(self, tag: int) -> Operation:
        """Complete the peer's receive under `tag` with no data."""
        ...

    def failure(self, operation: Operation) -> str | None:
        """Why a completed operation failed; None if it did not."""
        ...

    def lost(self) -> str | None:
        """Why the peer cannot be reached any more; None while it can, as far as is known."""
        ...

    def probe(self) -> str | None:
        """As `lost`, but asks the connection itself, now."""
        ...

    def describe(self) -> str:
        """The transports in use, such as "posix/memory, tcp/eth0"."""
        ...

    def close(self) -> None:
        """End the connection and every operation on it. Idempotent."""
        ...


class Transport(Protocol):
    """Makes channels and moves their data."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int:
        """Where peers connect; known from the start."""
        ...

    def open(self) -> None:
        """Called once, on the thread that will make all other calls. Raises TransportError."""
        ...

    def connect(self, host: str, port: int) -> Channel:
        """Start a connection; a failure shows as `lost`."""
        ...

    def accept(self) -> Channel | None:
        """A connection that a peer has started, or None."""
        ...

    def progress(self) -> Iterable[Channel]:
        """Move data. Channels on which something may have changed since the last call."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleep until `progress` may have work, `wake` is called, or the time is over."""
        ...

    def wake(self) -> None:
        """End a `wait` in progress, or the next one. Thread-safe."""
        ...

    def close(self) -> None:
        """Close every channel and stop listening."""
        ...
