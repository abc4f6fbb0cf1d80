"""The bytes of the session plane: length-prefixed msgpack, positional and strict.

    frame     4 bytes big-endian length, then that many bytes of msgpack
    message   [kind, ...], lists and scalars only: a map or an extension type is refused

After the handshake (`handshake.py`) the ingress sends SUBMIT, ABORT, MIGRATE and BEAT; the engine sends MIGRATED,
MIGRATION_WANTED and STEP: its load and a row for each token. A plain token is a row of five values; more (logprobs,
finish, error ...) makes it a row of ten.
What does not decode to exactly the dataclasses of `engine/orders.py` raises `WireError` and costs its sender the
session.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from typing import Any

import msgpack

from kvbaton.cluster.session.fields import WireError, index_below, natural, number, text
from kvbaton.cluster.session.migrations import (
    decode_migrated,
    decode_wanted,
    migrate_fields,
    migrated_fields,
    wanted_fields,
)
from kvbaton.cluster.session.requests import submit_fields
from kvbaton.engine.orders import Migrate, Migrated, MigrationWanted, Notice, Submit
from kvbaton.engine.request import MAX_SAMPLES, FinishReason, TokenLogprobs, TokenOutput
from kvbaton.router.engine_info import EngineLoad

# 1: first version. 2: migrations, a request's time limit, blocks by owner. 3: ends of hand-offs.
# 4: MIGRATED has a refusal or none.
# Any change to the order or number of positional fields raises it.
PROTOCOL_VERSION = 4

HELLO, CHALLENGE, PROOF, WELCOME, REFUSED, SUBMIT, ABORT, BEAT, STEP, MIGRATE, MIGRATED, MIGRATION_WANTED = range(12)

HEADER = struct.Struct(">I")
MAX_ERROR_CHARS = 4096
MAX_ARRAY = 1 << 20

LOAD_FIELDS = tuple(field.name for field in dataclasses.fields(EngineLoad))

_FINISHES = tuple(FinishReason)
_PLAIN_ROW = 5
_FULL_ROW = 10


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

    def message(self, *fields: object) -> bytes:
        body: bytes = self._pack(fields)
        return HEADER.pack(len(body)) + body

    def submit(self, submit: Submit) -> bytes:
        return self.message(SUBMIT, *submit_fields(submit))

    def abort(self, request_id: str, sample: int | None) -> bytes:
        return self.message(ABORT, request_id, sample)

    def migrate(self, order: Migrate) -> bytes:
        return self.message(MIGRATE, *migrate_fields(order))

    def notice(self, notice: Notice) -> bytes:
        if isinstance(notice, Migrated):
            return self.message(MIGRATED, *migrated_fields(notice))
        return self.message(MIGRATION_WANTED, *wanted_fields(notice))

    def beat(self) -> bytes:
        return self.message(BEAT)

    def step(self, outputs: Iterable[TokenOutput], load: EngineLoad) -> bytes:
        return self.message(STEP, load_fields(load), [_row(output) for output in outputs])


def unpack(frame: bytes) -> tuple[int, list[Any]]:
    """(kind, the other fields) of one frame."""
    try:
        message = msgpack.unpackb(frame, max_array_len=min(len(frame), MAX_ARRAY), max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error or type(error).__name__}") from error
    if type(message) is not list or not message or type(message[0]) is not int:
        raise WireError("a message is a list that starts with its kind")
    return message[0], message[1:]


def load_fields(load: EngineLoad) -> list[float]:
    return [getattr(load, name) for name in LOAD_FIELDS]


def decode_load(fields: object) -> EngineLoad:
    if type(fields) is not list or len(fields) != len(LOAD_FIELDS):
        raise WireError(f"load must be {len(LOAD_FIELDS)} numbers")
    for name, value in zip(LOAD_FIELDS, fields, strict=True):
        if (type(value) is not int and type(value) is not float) or not value >= 0:
            raise WireError(f"load.{name} must be a number >= 0, got {value!r:.40}")
    return EngineLoad(*fields)


def decode_notice(kind: int, fields: list[Any]) -> Migrated | MigrationWanted:
    """What an engine says besides its steps. Raises `WireError` for a kind that is for engines."""
    if kind == MIGRATED:
        return decode_migrated(fields)
    if kind == MIGRATION_WANTED:
        return decode_wanted(fields)
    raise WireError(f"message kind {kind} is not for an ingress")


def decode_step(fields: list[Any]) -> tuple[list[TokenOutput], EngineLoad]:
    """Fields of a STEP message."""
    if len(fields) != 2 or type(fields[1]) is not list:
        raise WireError("a step is a load and a list of rows")
    return [_output(row) for row in fields[1]], decode_load(fields[0])


def _row(output: TokenOutput) -> tuple[object, ...]:
    finish, logprobs, error = output.finish, output.logprobs, output.error
    base = (output.request_id, output.epoch, output.sample, output.index, output.token_id)
    prompt = output.prompt_logprobs
    if finish is None and logprobs is None and output.cached_tokens is None and prompt is None and error is None:
        return base
    return (
        *base,
        None if logprobs is None else _pack_logprobs(logprobs),
        None if finish is None else _FINISHES.index(finish),
        output.cached_tokens,
        None if prompt is None else [None if item is None else _pack_logprobs(item) for item in prompt],
        None if error is None else error[:MAX_ERROR_CHARS],
    )


def _pack_logprobs(value: TokenLogprobs) -> list[float]:
    flat = [value.logprob]
    for token_id, logprob in value.top:
        flat += (token_id, logprob)
    return flat


def _output(row: Any) -> TokenOutput:
    size = len(row) if type(row) is list else 0
    if size != _PLAIN_ROW and size != _FULL_ROW:
        raise WireError(f"a row has {_PLAIN_ROW} or {_FULL_ROW} values, got {size or type(row).__name__}")
    request_id, epoch, sample, index, token_id = row[:_PLAIN_ROW]
    if not (
        type(request_id) is str
        and type(epoch) is int
        and type(sample) is int
        and type(index) is int
        and epoch >= 0
        and 0 <= sample < MAX_SAMPLES
        and index >= 0
    ):
        raise WireError(f"a row starts with id, epoch, sample, index: got {row[:4]!r:.120}")
    ends_without_token = token_id is None and size == _FULL_ROW and row[6] is not None
    if (type(token_id) is not int or token_id < 0) and not ends_without_token:
        raise WireError(f"token id must be an integer >= 0, or null with a finish: got {token_id!r:.40}")
    if size == _PLAIN_ROW:
        return TokenOutput(request_id, epoch, sample, index, token_id)
    return _full_output(row)


def _full_output(row: list[Any]) -> TokenOutput:
    logprobs, finish, cached, prompt, error = row[_PLAIN_ROW:]
    if prompt is not None and type(prompt) is not list:
        raise WireError("prompt_logprobs must be a list")
    return TokenOutput(
        request_id=row[0],
        epoch=row[1],
        sample=row[2],
        index=row[3],
        token_id=row[4],
        logprobs=None if logprobs is None else _unpack_logprobs(logprobs),
        finish=None if finish is None else _FINISHES[index_below("finish", finish, len(_FINISHES))],
        cached_tokens=None if cached is None else natural("cached_tokens", cached),
        prompt_logprobs=None if prompt is None else tuple(None if x is None else _unpack_logprobs(x) for x in prompt),
        error=None if error is None else text("error", error, MAX_ERROR_CHARS),
    )


def _unpack_logprobs(flat: Any) -> TokenLogprobs:
    if type(flat) is not list or len(flat) % 2 == 0:
        raise WireError("logprobs must be a logprob and pairs of token id, logprob")
    values = [number("logprob", value) for value in flat[::2]]
    ids = [natural("logprobs token id", value) for value in flat[1::2]]
    return TokenLogprobs(values[0], tuple(zip(ids, values[1:], strict=True)))
