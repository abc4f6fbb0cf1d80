"""Guards the session wire format: round trips of every field, strict refusal of the rest, caps before allocation."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.cluster.session.fields import WireError
from kvbaton.cluster.session.migrations import decode_migrate
from kvbaton.cluster.session.requests import SAMPLING_FIELDS, decode_abort, decode_submit
from kvbaton.cluster.session.wire import (
    HEADER,
    MIGRATE,
    MIGRATED,
    MIGRATION_WANTED,
    STEP,
    SUBMIT,
    Encoder,
    FrameReader,
    decode_notice,
    decode_step,
    unpack,
)
from kvbaton.engine.orders import LegKind, Migrate, Migrated, MigrationWanted, Submit
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenLogprobs, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineLoad

LOAD = EngineLoad(1, 2, 3, 4, 5, 10, 7, 0.25, 1, 2, 3, 4)

PLAIN = TokenOutput("req-1", 2, 3, 17, 151_643)
RICH = TokenOutput(
    "req-2",
    0,
    0,
    0,
    9,
    logprobs=TokenLogprobs(-0.5, ((9, -0.5), (4, -1.25))),
    finish=FinishReason.STOP,
    cached_tokens=32,
    prompt_logprobs=(None, TokenLogprobs(-2.0), TokenLogprobs(-math.inf, ((1, -0.125),))),
)
DEAD = TokenOutput("req-3", 1, 15, 5, None, finish=FinishReason.ERROR, error="hand-off failed")

SAMPLING = SamplingParams(
    max_tokens=77,
    seed=-(1 << 63),
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    logit_bias=((5, -100.0), (6, 2.5)),
    logprobs=20,
    prompt_logprobs=0,
    n=3,
    min_tokens=2,
    stop_token_ids=(2, 151_645),
    ignore_eos=True,
)
REQUEST = Request("req-é", (1, 2, 4_000_000_000), SAMPLING, (0, 2), (7, 8), 3, "tenant", 12.5)
PAIRED = Submit(REQUEST, LegKind.PREFILL, PeerAddress("d1", 4, "10.0.0.2", 65_535))


def body(frame: bytes) -> bytes:
    assert HEADER.unpack_from(frame) == (len(frame) - HEADER.size,)
    return frame[HEADER.size :]


def wire_row(*changes: tuple[int, object]) -> list[object]:
    row: list[object] = ["r", 0, 0, 0, 1, None, None, None, None, None]
    for position, value in changes:
        row[position] = value
    return row


def test_step_round_trip_keeps_every_field() -> None:
    kind, fields = unpack(body(Encoder().step([PLAIN, RICH, DEAD], LOAD)))
    assert kind == STEP
    assert decode_step(fields) == ([PLAIN, RICH, DEAD], LOAD)


def test_plain_token_is_a_row_of_five() -> None:
    """A dense decode step must not pay for fields that it does not use."""
    _, fields = unpack(body(Encoder().step([PLAIN], LOAD)))
    assert fields[1] == [["req-1", 2, 3, 17, 151_643]]


@pytest.mark.parametrize(
    "changed", [{"cached_tokens": 0}, {"prompt_logprobs": (None,)}, {"logprobs": TokenLogprobs(0.0)}, {"error": "x"}]
)
def test_each_optional_output_field_alone_survives(changed: dict[str, object]) -> None:
    output = dataclasses.replace(PLAIN, **changed)  # type: ignore[arg-type]
    _, fields = unpack(body(Encoder().step([output], LOAD)))
    assert decode_step(fields)[0] == [output]


@pytest.mark.parametrize(
    "submit", [PAIRED, Submit(REQUEST, LegKind.LOCAL), Submit(REQUEST, LegKind.DECODE, PAIRED.peer)]
)
def test_submit_round_trip(submit: Submit) -> None:
    kind, fields = unpack(body(Encoder().submit(submit)))
    assert kind == SUBMIT
    assert decode_submit(fields) == submit


def test_no_sampling_or_request_field_is_forgotten() -> None:
    """A field added to the dataclasses but not to the wire would silently fall back to its default on the engine."""
    assert tuple(name for name, _ in SAMPLING_FIELDS) == tuple(f.name for f in dataclasses.fields(SamplingParams))
    assert len(dataclasses.fields(Request)) == 8
    assert len(dataclasses.fields(TokenOutput)) == 10
    defaults = SamplingParams(max_tokens=1)
    assert all(getattr(SAMPLING, name) != getattr(defaults, name) for name, _ in SAMPLING_FIELDS)


@pytest.mark.parametrize("sample", [None, 0, 15])
def test_abort_round_trip(sample: int | None) -> None:
    _, fields = unpack(body(Encoder().abort("r", sample)))
    assert decode_abort(fields) == ("r", sample)


MIGRATE_ORDER = Migrate("r~1.0", 3, PeerAddress("d1", 4, "10.0.0.2", 65_535), "r~2.0", 2, 2000)


@pytest.mark.parametrize("order", [MIGRATE_ORDER, dataclasses.replace(MIGRATE_ORDER, to=None)])
def test_migrate_round_trip(order: Migrate) -> None:
    kind, fields = unpack(body(Encoder().migrate(order)))
    assert kind == MIGRATE
    assert decode_migrate(fields) == order


@pytest.mark.parametrize(
    "notice", [Migrated("r", 1, None), Migrated("r", 2, "no room"), MigrationWanted("r", "d1"), MigrationWanted("r")]
)
def test_notice_round_trip(notice: Migrated | MigrationWanted) -> None:
    assert decode_notice(*unpack(body(Encoder().notice(notice)))) == notice


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (MIGRATED, ["r", 1, True], "refusal"),
        (MIGRATED, ["r", 1], "list of 3"),
        (MIGRATED, ["r", 1, "x" * 1025], "refusal"),
        (MIGRATION_WANTED, ["r", 7], "to"),
        (SUBMIT, [], "not for an ingress"),
    ],
)
def test_malformed_notice_is_refused_by_field(kind: int, fields: list[object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_notice(kind, fields)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(1, 16, "sample"), (2, ["d1", 1, "h"], "peer"), (4, -1, "new epoch"), (5, None, "context tokens")],
)
def test_malformed_move_is_refused_by_field(at: int, value: object, message: str) -> None:
    _, fields = unpack(body(Encoder().migrate(MIGRATE_ORDER)))
    fields[at] = value
    with pytest.raises(WireError, match=message):
        decode_migrate(fields)


def test_error_text_is_cut_not_refused() -> None:
    output = dataclasses.replace(DEAD, error="x" * 10_000)
    _, fields = unpack(body(Encoder().step([output], LOAD)))
    assert decode_step(fields)[0][0].error == "x" * 4096


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("row", "a row has 5 or 10 values"),
        (["r", 0, 0, 0], "a row has 5 or 10 values, got 4"),
        (wire_row((0, 5)), "id, epoch, sample, index"),
        (wire_row((0, b"r")), "id, epoch, sample, index"),
        (wire_row((1, -1)), "id, epoch, sample, index"),
        (wire_row((2, 16)), "id, epoch, sample, index"),
        (wire_row((2, True)), "id, epoch, sample, index"),
        (wire_row((3, 1.0)), "id, epoch, sample, index"),
        (wire_row((4, -1)), "token id"),
        (wire_row((4, None)), "token id"),
        (["r", 0, 0, 0, None], "token id"),
        (wire_row((4, "7")), "token id"),
        (wire_row((5, [])), "logprobs"),
        (wire_row((5, [0.0, 1])), "logprobs"),
        (wire_row((5, [0.0, 1.5, 0.0])), "logprobs token id"),
        (wire_row((6, 4)), "finish"),
        (wire_row((6, "stop")), "finish"),
        (wire_row((7, -1)), "cached_tokens"),
        (wire_row((8, 3)), "prompt_logprobs"),
        (wire_row((9, "x" * 4097)), "error"),
    ],
)
def test_malformed_row_is_refused_by_field(row: object, message: str) -> None:
    _, fields = unpack(msgpack.packb([STEP, [0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0], [row]]))
    with pytest.raises(WireError, match=message):
        decode_step(fields)


@pytest.mark.parametrize(
    "load", [None, [0] * 11, [0] * 13, [0, 0, 0, 0, 0, 0, -1, 0.0, 0, 0, 0, 0], [0] * 11 + [math.nan], [0] * 11 + ["1"]]
)
def test_malformed_load_is_refused(load: object) -> None:
    with pytest.raises(WireError, match="load"):
        decode_step([load, []])


def valid_submit_fields() -> list[object]:
    _, fields = unpack(body(Encoder().submit(PAIRED)))
    return fields


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((0,), 4, "leg"),
        ((1,), ["d1", 4, "h"], "peer must be a list of 4"),
        ((1, 3), 65_536, "peer port"),
        ((1, 1), -4, "peer generation"),
        ((2, 0), "x" * 257, "request id"),
        ((2, 1), b"12345", "prompt"),
        ((2, 1), [1, 2], "prompt"),
        ((2, 2), [], "sampling must be a list of 16"),
        ((2, 2, 0), "9", "max_tokens"),
        ((2, 2, 0), True, "max_tokens"),
        ((2, 2, 2), None, "temperature"),
        ((2, 2, 9), [[1]], "logit_bias"),
        ((2, 2, 10), -1, "logprobs"),
        ((2, 2, 14), [1, -1], "stop_token_ids"),
        ((2, 2, 15), 1, "ignore_eos"),
        ((2, 3), [], "sample indices"),
        ((2, 3), [16], "sample index"),
        ((2, 5), 1.5, "epoch"),
        ((2, 6), None, "cache_salt"),
        ((2, 7), "1", "timeout"),
    ],
)
def test_malformed_submit_is_refused_by_field(path: tuple[int, ...], value: object, message: str) -> None:
    fields = valid_submit_fields()
    target: list[object] = fields
    for step in path[:-1]:
        target = target[step]  # type: ignore[assignment]
    target[path[-1]] = value
    with pytest.raises(WireError, match=message):
        decode_submit(fields)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x90",
        b"\x91\xa1x",
        b"\x81\x01\x02",
        b"\x92\x08\xc7\x01\x05x",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 2000,
        b"\x91\xd9\x02\xff\xfe",
        msgpack.packb([STEP]) + b"\x00",
    ],
)
def test_bytes_that_are_no_message_are_refused(frame: bytes) -> None:
    """Maps, extension types, bombs of length and depth, trailing bytes, bad UTF-8: all the same clear refusal."""
    with pytest.raises(WireError):
        unpack(frame)


def test_frames_are_found_in_any_chunking() -> None:
    frames = [b"", b"a", b"bc" * 40, b"d" * 300]
    stream = b"".join(HEADER.pack(len(frame)) + frame for frame in frames)
    for size in (1, 2, 3, 5, 64, len(stream)):
        reader = FrameReader(1000)
        found = [frame for start in range(0, len(stream), size) for frame in reader.feed(stream[start : start + size])]
        assert found == frames, f"chunks of {size}"


def test_oversized_frame_is_refused_at_its_header() -> None:
    reader = FrameReader(100)
    assert reader.feed(HEADER.pack(100)) == []
    with pytest.raises(WireError, match="frame of 101 bytes exceeds 100"):
        FrameReader(100).feed(HEADER.pack(101))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_escape_the_decoder(data: bytes) -> None:
    """Anything but a clean result or `WireError` would kill the connection's owner instead of the connection."""
    with contextlib.suppress(WireError):
        kind, fields = unpack(data)
        {STEP: decode_step, SUBMIT: decode_submit}.get(kind, decode_abort)(fields)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=10),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from([decode_step, decode_submit, decode_abort]), st.lists(values, max_size=4))
def test_well_formed_msgpack_of_the_wrong_shape_is_refused(decode: object, fields: list[object]) -> None:
    with contextlib.suppress(WireError):
        decode(fields)  # type: ignore[operator]
