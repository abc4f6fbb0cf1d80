"""The frames of one open session, numbered in each direction and bound to the two engines' generations."""

from __future__ import annotations

from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.wire import FRAME_OVERHEAD_BYTES, Frame, Message, WireError, decode, encode


class FrameNumbers:
    """`generation` is the own engine's. A frame that is lost, doubled, or meant for another incarnation is refused."""

    def __init__(self, generation: int, max_payload_bytes: int) -> None:
        self._generation = generation
        self._max_bytes = max_payload_bytes + FRAME_OVERHEAD_BYTES
        self._sent = 0
        self._received = 0

    def pack(self, message: Message, peer: PeerAddress) -> bytes:
        """The next frame to `peer`."""
        data = encode(Frame(self._sent, self._generation, peer.generation, message))
        self._sent += 1
        return data

    def unpack(self, data: bytes | bytearray, peer: PeerAddress | None) -> Message:
        """The message of the next frame from `peer`. Raises WireError."""
        frame = decode(data, self._max_bytes)
        if peer is None or frame.source_generation != peer.generation:
            raise WireError(f"frame from generation {frame.source_generation}, session is with {peer}")
        if frame.target_generation != self._generation:
            raise WireError(f"frame for generation {frame.target_generation}, this is {self._generation}")
        if frame.number != self._received:
            raise WireError(f"frame {frame.number} came where {self._received} was due")
        self._received += 1
        return frame.message
