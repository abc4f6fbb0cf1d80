"""The bytes of the session plane: length-prefixed frames of strict msgpack (kvtransfer/codec.py).

    frame     4 bytes big-endian length, then that many bytes of msgpack
    message   [kind, field, ...]: a type of `messages.KINDS` by its place there, and its fields

What does not decode to exactly one of the declared types raises `WireError` and costs its sender the session.

Protocol version, spoken in HELLO and CHALLENGE; any change to kinds, fields or their order raises it:
1  first version
2  migrations, a request's time limit, blocks by owner
3  ends of hand-offs
4  MIGRATED has a refusal or none
5  declared messages: a row has all fields, logprobs nest, kinds of ends and legs travel by name
6  a row has the cause of an error
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import msgpack
from msgspec import Struct, structs

from kvbaton.cluster.session.messages import KINDS, StepMessage
from kvbaton.engine.orders import Migrated, MigrationWanted
from kvbaton.engine.request import MAX_ERROR_CHARS, TokenOutput
from kvbaton.kvtransfer.codec import WireError, convert, parts_of, unpack
from kvbaton.router.engine_info import EngineLoad

PROTOCOL_VERSION = 6
HEADER = struct.Struct(">I")
MAX_ARRAY = 1 << 20

_KIND_OF = {message: kind for kind, message in enumerate(KINDS)}
_STEP = _KIND_OF[StepMessage]


class FrameReader:
    """Cuts a byte stream into frames; keeps at most one unfinished frame, never longer than `max_frame_bytes`."""

    __slots__ = ("_chunks", "_missing", "max_frame_bytes")

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._chunks: list[bytes] = []
        self._missing = HEADER.size  # bytes to come before the next frame (or header) can be complete

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes, without headers. Raises `WireError` before an oversized one is kept."""
        if self._chunks:
            self._chunks.append(data)
            if len(data) < self._missing:
                self._missing -= len(data)
                return []
            data = b"".join(self._chunks)
        frames: list[bytes] = []
        start = self._cut(data, frames)
        self._chunks = [data[start:]] if start < len(data) else []
        return frames

    def _cut(self, data: bytes, frames: list[bytes]) -> int:
        """Append the whole frames of `data`; returns where the unfinished rest starts."""
        start, end = 0, len(data)
        while end - start >= HEADER.size:
            (length,) = HEADER.unpack_from(data, start)
            if length > self.max_frame_bytes:
                raise WireError(f"frame of {length} bytes exceeds {self.max_frame_bytes}")
            body = start + HEADER.size
            if end - body < length:
                self._missing = length - (end - body)
                return start
            frames.append(data[body : body + length])
            start = body + length
        self._missing = HEADER.size - (end - start)
        return start


class Encoder:
    """Makes frames. One per connection end, because it reuses its buffer; not for use from two threads."""

    __slots__ = ("_pack",)

    def __init__(self) -> None:
        self._pack = msgpack.Packer().pack

    def message(self, message: Struct) -> bytes:
        """The frame of a message of one of the `KINDS`."""
        return self._frame([_KIND_OF[type(message)], *parts_of(message)])

    def notice(self, notice: Migrated | MigrationWanted) -> bytes:
        """A refusal that is too long is cut."""
        if isinstance(notice, Migrated) and notice.refusal is not None:
            notice = structs.replace(notice, refusal=notice.refusal[:MAX_ERROR_CHARS])
        return self.message(notice)

    def step(self, outputs: Iterable[TokenOutput], load: EngineLoad) -> bytes:
        """A `StepMessage`. An error that is too long is cut."""
        rows = [
            output if output.error is None else structs.replace(output, error=output.error[:MAX_ERROR_CHARS])
            for output in outputs
        ]
        return self._frame([_STEP, parts_of(load), parts_of(rows)])  # a StepMessage, without its check of each row

    def _frame(self, parts: list[Any]) -> bytes:
        body: bytes = self._pack(parts)
        return HEADER.pack(len(body)) + body


def kind_and_fields(frame: bytes) -> tuple[int, list[Any]]:
    """One frame taken apart, its fields not looked at."""
    parts = unpack(frame, len(frame), MAX_ARRAY)
    if type(parts) is not list or not parts or type(parts[0]) is not int:
        raise WireError("a message is a list that starts with its kind")
    return parts[0], parts[1:]


def decode_message(frame: bytes, allowed: Any) -> Any:
    """The message in a frame, which must be of one of the types of the union `allowed`. Raises `WireError`."""
    kind, fields = kind_and_fields(frame)
    message = KINDS[kind] if 0 <= kind < len(KINDS) else None
    if message is None or not issubclass(message, allowed):
        raise WireError(f"message kind {kind} has no place here")
    return convert(fields, message)
