"""The control messages of an open session and their strict msgpack form.

A frame is one flat msgpack array: [type, number, sender generation, receiver generation, fields...]. Decoding checks
the type and range of every field and knows no map, no extension type and no nesting but RENEW's list of handles and
SUMS' list of numbers, so that a hostile frame costs its own bytes and nothing more.

Protocol version, spoken in HELLO (handshake.py); raise it with any change here and add a line:
1  first version
2  SUMS: checksums of the blocks, where both engines use them; HELLO names the kind as a field of its own
3  CANCEL has a cause: given up, or nothing left to hand over
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from kvbaton.kvtransfer.messages import Cause, GivenUp

PROTOCOL_VERSION = 3
MAX_ID_CHARS = 256
MAX_REASON_CHARS = 1024
MAX_RENEW_HANDLES = 256
MAX_SUMS = 32
BLOCK_TAG = 1 << 63  # tags with this bit carry blocks; a transport may use the others for itself
FRAME_OVERHEAD_BYTES = 64 << 10


class WireError(Exception):
    """Bytes that are no message of this protocol version; the text says which rule they break."""


@dataclass(frozen=True, slots=True)
class Handle:
    """Names one hand-off on the wire. `serial` is the sender's own count, so a key offered twice is two hand-offs."""

    request_id: str
    epoch: int
    serial: int


@dataclass(frozen=True, slots=True)
class OfferMessage:
    handle: Handle
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GrantMessage:
    """Receives are posted for prompt blocks first_block..first_block+count-1; tags count up from `first_tag`."""

    handle: Handle
    first_tag: int
    first_block: int
    count: int


@dataclass(frozen=True, slots=True)
class BlocksMessage:
    """Blocks first_block..first_block+count-1 are on their way. Data only ever follows for announced blocks."""

    handle: Handle
    first_block: int
    count: int


@dataclass(frozen=True, slots=True)
class SumsMessage:
    """The checksums of blocks first_block..; each block's is sent once, in order, when the block has been posted."""

    handle: Handle
    first_block: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DoneMessage:
    """Everything granted is on its way (`num_sent` blocks in all); `payload` is the worker's own."""

    handle: Handle
    num_sent: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class AckMessage:
    handle: Handle


@dataclass(frozen=True, slots=True)
class CancelMessage:
    """The sender of this gives the hand-off up of its own will."""

    handle: Handle
    reason: str
    cause: GivenUp


@dataclass(frozen=True, slots=True)
class FailMessage:
    """The hand-off failed at the sender of this, or the message it answers was refused."""

    handle: Handle
    reason: str


@dataclass(frozen=True, slots=True)
class RenewMessage:
    """I live and hold these. A request (`is_reply` False) is answered with its own `stamp_us`, which times the link."""

    stamp_us: int
    is_reply: bool
    handles: tuple[Handle, ...]


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


@dataclass(frozen=True, slots=True)
class Frame:
    """A message with the generations of the engines it goes from and to, and its number in its own direction.

    A gap in the numbers tells at once that a frame was lost, which else only a timeout would.
    """

    number: int
    source_generation: int
    target_generation: int
    message: Message


def _unsigned(bits: int) -> Callable[[Any], int]:
    limit = 1 << bits

    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value < limit:
            raise WireError(f"expected an unsigned {bits}-bit integer, got {_show(value)}")
        return value

    return check


def _text(max_chars: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > max_chars:
            raise WireError(f"expected a string of at most {max_chars} characters, got {_show(value)}")
        return value

    return check


def _binary(value: Any) -> bytes:
    if type(value) is not bytes:
        raise WireError(f"expected bytes, got {_show(value)}")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise WireError(f"expected a boolean, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def _block_tag(value: Any) -> int:
    """Leaves room for any count above it, so a tag never leaves its 64 bits."""
    if type(value) is not int or not BLOCK_TAG <= value < (1 << 64) - (1 << 24):
        raise WireError(f"expected a block tag, got {_show(value)}")
    return value


def _cause(value: Any) -> GivenUp:
    if type(value) is not int or not 0 <= value < len(_CAUSES):
        raise WireError(f"expected the number of a cause, got {_show(value)}")
    return _CAUSES[value]


def _sums(value: Any) -> tuple[int, ...]:
    if type(value) is not list or not 0 < len(value) <= MAX_SUMS:
        raise WireError(f"expected a list of 1 to {MAX_SUMS} checksums, got {_show(value)}")
    return tuple(_U64(item) for item in value)


_U24, _U32, _U63, _U64 = _unsigned(24), _unsigned(32), _unsigned(63), _unsigned(64)
_CAUSES: tuple[GivenUp, ...] = (Cause.CANCELLED, Cause.FINISHED)
_REQUEST_ID, _REASON = _text(MAX_ID_CHARS), _text(MAX_REASON_CHARS)

# Type number, class, and the checks of the fields that follow the handle, in the class's order.
_SCHEMA: tuple[tuple[int, Any, tuple[Callable[[Any], Any], ...]], ...] = (
    (1, OfferMessage, (_U32, _U24)),
    (2, GrantMessage, (_block_tag, _U24, _U24)),
    (3, BlocksMessage, (_U24, _U24)),
    (4, DoneMessage, (_U24, _binary)),
    (5, AckMessage, ()),
    (6, CancelMessage, (_REASON, _cause)),
    (7, FailMessage, (_REASON,)),
    (9, SumsMessage, (_U24, _sums)),
)
_RENEW = 8
_BY_KIND = {kind: (cls, checks) for kind, cls, checks in _SCHEMA}
_KIND_OF = {cls: kind for kind, cls, _ in _SCHEMA}


def encode(frame: Frame) -> bytes:
    message = frame.message
    head = [frame.number, frame.source_generation, frame.target_generation]
    if isinstance(message, RenewMessage):
        handles = [part for h in message.handles for part in (h.request_id, h.epoch, h.serial)]
        return _pack([_RENEW, *head, message.stamp_us, message.is_reply, handles])
    handle = message.handle
    values = (getattr(message, name) for name in message.__slots__[1:])
    fields = [_CAUSES.index(value) if isinstance(value, Cause) else value for value in values]
    return _pack([_KIND_OF[type(message)], *head, handle.request_id, handle.epoch, handle.serial, *fields])


def decode(data: bytes | bytearray, max_bytes: int) -> Frame:
    """Raises WireError on anything but one well-formed frame of at most `max_bytes`."""
    parts = unpack_array(data, max_bytes, max_items=3 * MAX_RENEW_HANDLES)
    if len(parts) < 4:
        raise WireError(f"a frame has at least 4 fields, got {len(parts)}")
    kind, number, source, target = _U32(parts[0]), _U63(parts[1]), _U63(parts[2]), _U63(parts[3])
    message = _decode_renew(parts[4:]) if kind == _RENEW else _decode_message(kind, parts[4:])
    return Frame(number, source, target, message)


def unpack_array(data: bytes | bytearray, max_bytes: int, max_items: int) -> list[Any]:
    """One msgpack array and nothing behind it. msgpack bounds nesting itself; lengths are bounded by `data`."""
    if len(data) > max_bytes:
        raise WireError(f"frame of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        parts = msgpack.unpackb(
            data,
            raw=False,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_array_len=max_items,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not msgpack: {type(error).__name__} {error!s:.80}") from None
    if type(parts) is not list:
        raise WireError(f"expected an array, got {_show(parts)}")
    return parts


def _decode_message(kind: int, fields: list[Any]) -> Message:
    if kind not in _BY_KIND:
        raise WireError(f"unknown message type {kind}")
    cls, checks = _BY_KIND[kind]
    if len(fields) != 3 + len(checks):
        raise WireError(f"{cls.__name__} has {3 + len(checks)} fields, got {len(fields)}")
    values = [check(value) for check, value in zip(checks, fields[3:], strict=True)]
    message: Message = cls(_handle(fields[:3]), *values)
    return message


def _decode_renew(fields: list[Any]) -> RenewMessage:
    if len(fields) != 3 or type(fields[2]) is not list or len(fields[2]) % 3:
        raise WireError("RenewMessage has a stamp, a flag and a list of handles")
    flat = fields[2]
    handles = tuple(_handle(flat[i : i + 3]) for i in range(0, len(flat), 3))
    return RenewMessage(_U63(fields[0]), _flag(fields[1]), handles)


def _handle(fields: list[Any]) -> Handle:
    return Handle(_REQUEST_ID(fields[0]), _U32(fields[1]), _U63(fields[2]))


def _pack(parts: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(parts, use_bin_type=True)
    return packed
