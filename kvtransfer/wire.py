"""The frames of an open session and the control messages in them, declared for the strict codec (codec.py).

A frame is [number, sender generation, receiver generation, [type, fields ...]], where the first field of every message
but RENEW is the handle of a hand-off.

Protocol version, spoken in HELLO (handshake.py); raise it with any change here and add a line:
1  first version
2  SUMS: checksums of the blocks, where both engines use them; HELLO names the kind as a field of its own
3  CANCEL has a cause: given up, or nothing left to hand over; messages, handles and addresses are arrays of their own
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from kvbaton.kvtransfer.codec import Unsigned24, Unsigned32, Unsigned63, Unsigned64, WireError, decode, pack
from kvbaton.kvtransfer.messages import MAX_ID_CHARS, Cause, PeerAddress

PROTOCOL_VERSION = 3
MAX_REASON_CHARS = 1024
MAX_RENEW_HANDLES = 256
MAX_SUMS = 32
BLOCK_TAG = 1 << 63  # tags with this bit carry blocks; a transport may use the others for itself
FRAME_OVERHEAD_BYTES = 64 << 10
_MAX_BLOCK_TAG = (1 << 64) - (1 << 24)  # leaves room for any count above it, so that a tag never leaves its 64 bits

_Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]


class Handle(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Names one hand-off on the wire. `serial` is the sender's own count, so a key offered twice is two hand-offs."""

    request_id: Annotated[str, Meta(max_length=MAX_ID_CHARS)]
    epoch: Unsigned32
    serial: Unsigned63


class OfferMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    handle: Handle
    num_tokens: Unsigned32
    num_blocks: Unsigned24


class GrantMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Receives are posted for prompt blocks first_block..first_block+count-1; tags count up from `first_tag`."""

    handle: Handle
    first_tag: Unsigned64
    first_block: Unsigned24
    count: Unsigned24

    def __post_init__(self) -> None:
        if not BLOCK_TAG <= self.first_tag < _MAX_BLOCK_TAG:
            raise ValueError(f"first_tag must be a block tag, got {self.first_tag}")


class BlocksMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """Blocks first_block..first_block+count-1 are on their way. Data only ever follows for announced blocks."""

    handle: Handle
    first_block: Unsigned24
    count: Unsigned24


class DoneMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """Everything granted is on its way (`num_sent` blocks in all); `payload` is the worker's own."""

    handle: Handle
    num_sent: Unsigned24
    payload: bytes


class AckMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    handle: Handle


class CancelMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """The sender of this gives the hand-off up of its own will, for one of the two causes that a worker may name."""

    handle: Handle
    reason: _Reason
    cause: Cause

    def __post_init__(self) -> None:
        if self.cause not in (Cause.CANCELLED, Cause.FINISHED):
            raise ValueError(f"cause must be one of a cancellation, got {self.cause.name}")


class FailMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """The hand-off failed at the sender of this, or the message it answers was refused."""

    handle: Handle
    reason: _Reason


class RenewMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=8):
    """I live and hold these. A request (`is_reply` False) is answered with its own `stamp_us`, which times the link."""

    stamp_us: Unsigned63
    is_reply: bool
    handles: Annotated[tuple[Handle, ...], Meta(max_length=MAX_RENEW_HANDLES)]


class SumsMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=9):
    """The checksums of blocks first_block..; each block's is sent once, in order, when the block has been posted."""

    handle: Handle
    first_block: Unsigned24
    sums: Annotated[tuple[Unsigned64, ...], Meta(min_length=1, max_length=MAX_SUMS)]


Message = (
    OfferMessage
    | GrantMessage
    | BlocksMessage
    | SumsMessage
    | DoneMessage
    | AckMessage
    | CancelMessage
    | FailMessage
    | RenewMessage
)


class Frame(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message with the generations of the engines it goes from and to, and its number in its own direction.

    A gap in the numbers tells at once that a frame was lost, which else only a timeout would.
    """

    number: Unsigned63
    source_generation: Unsigned63
    target_generation: Unsigned63
    message: Message


def decode_frame(data: bytes | bytearray, max_bytes: int) -> Frame:
    """Raises WireError on anything but one well-formed frame of at most `max_bytes`; its `pack` is the inverse."""
    return decode(data, Frame, max_bytes, max_items=2 * MAX_RENEW_HANDLES)


class FrameNumbers:
    """The frames of one open session, numbered in each direction and bound to the two engines' generations.

    `generation` is the engine's here. A frame that is lost, doubled, or meant for another incarnation is refused.
    """

    def __init__(self, generation: int, max_payload_bytes: int) -> None:
        self._generation = generation
        self._max_bytes = max_payload_bytes + FRAME_OVERHEAD_BYTES
        self._sent = 0
        self._received = 0

    def pack(self, message: Message, peer: PeerAddress) -> bytes:
        """The next frame to `peer`. A reason that is too long is cut."""
        if isinstance(message, CancelMessage | FailMessage):
            message = replace(message, reason=message.reason[:MAX_REASON_CHARS])
        data = pack(Frame(self._sent, self._generation, peer.generation, message))
        self._sent += 1
        return data

    def unpack(self, data: bytes | bytearray, peer: PeerAddress | None) -> Message:
        """The message of the next frame from `peer`. Raises WireError."""
        frame = decode_frame(data, self._max_bytes)
        if peer is None or frame.source_generation != peer.generation:
            raise WireError(f"frame from generation {frame.source_generation}, session is with {peer}")
        if frame.target_generation != self._generation:
            raise WireError(f"frame for generation {frame.target_generation}, this is {self._generation}")
        if frame.number != self._received:
            raise WireError(f"frame {frame.number} came where {self._received} was due")
        self._received += 1
        return frame.message
