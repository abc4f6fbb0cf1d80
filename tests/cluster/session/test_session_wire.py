"""Guards the session wire format: round trips of every field, strict refusal of the rest, caps before allocation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct, structs

from kvbaton.cluster.session.messages import (
    KINDS,
    AbortMessage,
    StepMessage,
    SubmitMessage,
    ToEngine,
    ToIngress,
)
from kvbaton.cluster.session.wire import HEADER, PROTOCOL_VERSION, Encoder, FrameReader, decode_message, kind_and_fields
from kvbaton.engine.orders import LegKind, Migrate, Migrated, MigrationWanted, Submit
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenLogprobs, TokenOutput
from kvbaton.kvtransfer.codec import WireError, parts_of
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineLoad
from support.wire_cases import UNPACKABLE, Wrong, digest_of, legal, sample, wrong

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


MIGRATE = Migrate("r~1.0", 3, PeerAddress("d1", 4, "10.0.0.2", 65_535), "r~2.0", 2, 2000)
SPECIAL = {"token_id": 77}  # None needs a finish: see the tests of rows without a token
ANY = Struct


def body(frame: bytes) -> bytes:
    assert HEADER.unpack_from(frame) == (len(frame) - HEADER.size,)
    return frame[HEADER.size :]


def there_and_back(message: Struct) -> Any:
    return decode_message(body(Encoder().message(message)), ANY)


def framed(kind: type[Struct], parts: list[Any]) -> bytes:
    return bytes(msgpack.packb([KINDS.index(kind), *parts], datetime=True))


def test_other_fields_are_another_version() -> None:
    """A message that has changed needs another PROTOCOL_VERSION, with a line of its history, and its digest here:
    engines of two versions would take each other's fields for their own."""
    assert {PROTOCOL_VERSION: digest_of(KINDS)} == {6: "9720deeda3b1"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_message_comes_back_equal(kind: type[Struct], data: st.DataObject) -> None:
    message = data.draw(legal(kind, SPECIAL))
    assert there_and_back(message) == message


def broken_messages() -> Iterator[Any]:
    for kind in KINDS:
        for case in wrong(kind, SPECIAL):
            yield pytest.param(kind, case, id=f"{kind.__name__}: {case.label}")


@pytest.mark.parametrize(("kind", "case"), list(broken_messages()))
def test_each_wrong_field_of_each_message_is_refused_by_name(kind: type[Struct], case: Wrong) -> None:
    with pytest.raises(WireError) as refused:
        decode_message(framed(kind, case.parts), ANY)
    assert any(name in str(refused.value) for name in case.names)


@pytest.mark.parametrize("alien", UNPACKABLE, ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_map_or_an_extension_type_is_refused_in_every_field(kind: type[Struct], alien: object) -> None:
    good = parts_of(sample(kind, SPECIAL))
    for at in range(len(good)):
        with pytest.raises(WireError, match="not msgpack"):
            decode_message(framed(kind, [*good[:at], alien, *good[at + 1 :]]), ANY)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("end", [ToEngine, ToIngress])
def test_each_end_takes_its_own_messages_alone(kind: type[Struct], end: Any) -> None:
    frame = body(Encoder().message(sample(kind, SPECIAL)))
    if kind in get_args(end):
        assert decode_message(frame, end) == sample(kind, SPECIAL)
    else:
        with pytest.raises(WireError, match=f"message kind {KINDS.index(kind)} has no place here"):
            decode_message(frame, end)


@pytest.mark.parametrize("kind", [-1, len(KINDS), 1 << 63])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(WireError, match=f"message kind {kind} has no place here"):
        decode_message(msgpack.packb([kind]), ANY)


def test_step_round_trip_keeps_every_field() -> None:
    frame = body(Encoder().step([PLAIN, RICH, DEAD], LOAD))
    assert decode_message(frame, ToIngress) == StepMessage(LOAD, [PLAIN, RICH, DEAD])


def test_a_row_without_a_token_needs_a_finish() -> None:
    parts = parts_of(StepMessage(LOAD, [DEAD]))
    parts[1][0][TokenOutput.__struct_fields__.index("finish")] = None
    with pytest.raises(WireError, match="a row without a token_id must have a finish"):
        decode_message(framed(StepMessage, parts), ANY)


@pytest.mark.parametrize("step_s", [math.nan, -1.0, "0"])
def test_a_malformed_load_is_refused(step_s: object) -> None:
    parts = parts_of(StepMessage(LOAD, []))
    parts[0][EngineLoad.__struct_fields__.index("step_s")] = step_s
    with pytest.raises(WireError, match=r"load\.step_s"):
        decode_message(framed(StepMessage, parts), ANY)


def test_texts_that_are_too_long_are_cut_not_refused() -> None:
    output = structs.replace(DEAD, error="x" * 10_000)
    message = decode_message(body(Encoder().step([output], LOAD)), ToIngress)
    assert message.outputs[0].error == "x" * 4096
    notice = decode_message(body(Encoder().notice(Migrated("r", 1, "x" * 10_000))), ToIngress)
    assert notice.refusal == "x" * 4096


@pytest.mark.parametrize(
    "submit", [PAIRED, Submit(REQUEST, LegKind.LOCAL), Submit(REQUEST, LegKind.DECODE, PAIRED.peer)]
)
def test_submit_round_trip(submit: Submit) -> None:
    assert there_and_back(SubmitMessage.of(submit)).submit() == submit


def test_no_sampling_or_request_field_is_forgotten() -> None:
    """A field left out of `SubmitMessage` would silently fall back to its default on the engine."""
    assert {f.name for f in dataclasses.fields(Request)} < set(SubmitMessage.__struct_fields__)
    bare = Request("", (), SAMPLING)
    same = [f.name for f in dataclasses.fields(Request) if getattr(REQUEST, f.name) == getattr(bare, f.name)]
    assert same == ["sampling"], "what the tests send has a value of its own in every field"


@pytest.mark.parametrize("field", ["prompt", "emitted"])
def test_half_a_token_is_refused_by_field(field: str) -> None:
    message = structs.replace(SubmitMessage.of(PAIRED), **{field: b"12345"})
    with pytest.raises(WireError, match=field):
        there_and_back(message).submit()


@pytest.mark.parametrize(
    "message",
    [
        AbortMessage("r", None),
        AbortMessage("r", 15),
        MIGRATE,
        structs.replace(MIGRATE, to=None),
        Migrated("r", 1, None),
        Migrated("r", 2, "no room"),
        MigrationWanted("r", "d1"),
        MigrationWanted("r"),
    ],
)
def test_optional_fields_travel_set_and_unset(message: Struct) -> None:
    assert there_and_back(message) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((0,), "nothing", "SubmitMessage.kind: invalid enum value 'nothing'"),
        ((1, 3), 65_536, "SubmitMessage.peer.port: expected `int` <= 65535, got 65536"),
        ((4, 0), True, "SubmitMessage.sampling.max_tokens: expected `int`, got `bool`"),
        ((4, 9), [[1, 0.5], [-1, 2]], r"SubmitMessage.sampling.logit_bias\[1\]\[0\]: expected `int` >= 0, got -1"),
        ((5,), [0, 16], r"SubmitMessage.sample_indices\[1\]: expected `int` <= 15, got 16"),
        ((9,), "1", "SubmitMessage.timeout_s: expected `float | null`, got `str`"),
    ],
)
def test_a_refusal_says_which_field_breaks_which_rule(path: tuple[int, ...], value: object, message: str) -> None:
    parts = parts_of(SubmitMessage.of(PAIRED))
    target: Any = parts
    for step in path[:-1]:
        target[step] = list(target[step])
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(WireError, match=message.replace("|", "\\|")):
        decode_message(framed(SubmitMessage, parts), ANY)


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
        msgpack.packb([8]) + b"\x00",
    ],
)
def test_bytes_that_are_no_message_are_refused(frame: bytes) -> None:
    """Maps, extension types, bombs of length and depth, trailing bytes, bad UTF-8: all the same clear refusal."""
    with pytest.raises(WireError):
        kind_and_fields(frame)


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
        decode_message(data, ANY)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=10),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.lists(values, max_size=4))
def test_well_formed_msgpack_of_the_wrong_shape_is_refused(kind: type[Struct], fields: list[object]) -> None:
    with contextlib.suppress(WireError):
        decode_message(framed(kind, fields), ANY)
