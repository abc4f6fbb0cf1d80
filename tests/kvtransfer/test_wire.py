"""Guards the control decoder: what is legal comes back equal, and no bytes of a stranger do more than be refused."""

from __future__ import annotations

import contextlib
import resource
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from kvbaton.kvtransfer.codec import WireError, pack
from kvbaton.kvtransfer.handshake import HandshakeFrame, Hello
from kvbaton.kvtransfer.messages import Cause, PeerAddress
from kvbaton.kvtransfer.wire import (
    BLOCK_TAG,
    PROTOCOL_VERSION,
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    Frame,
    FrameNumbers,
    GrantMessage,
    Handle,
    Message,
    decode_frame,
)
from support.wire_cases import UNPACKABLE, Wrong, digest_of, legal, sample, wrong

CAP = 1 << 16
MESSAGES = get_args(Message)
SPECIAL = {"first_tag": BLOCK_TAG | 77, "cause": Cause.FINISHED}
frames = legal(Frame, SPECIAL)


@given(frames)
def test_every_message_comes_back_equal(frame: Frame) -> None:
    assert decode_frame(pack(frame), CAP) == frame


@pytest.mark.parametrize("first_tag", [BLOCK_TAG, (1 << 64) - (1 << 24) - 1])
def test_the_first_and_the_last_block_tag_travel(first_tag: int) -> None:
    frame = Frame(0, 0, 0, GrantMessage(Handle("r", 0, 1), first_tag, 0, 1))
    assert decode_frame(pack(frame), CAP) == frame


def test_other_fields_are_another_version() -> None:
    """A message that has changed needs another PROTOCOL_VERSION, with a line of its history, and its digest here:
    a peer of another version is told which, one that claims the same would misread it."""
    assert {PROTOCOL_VERSION: digest_of([Frame, Hello, HandshakeFrame])} == {3: "015755d12d71"}


def broken_messages() -> list[Any]:
    return [
        pytest.param(case, id=f"{kind.__name__}: {case.label}") for kind in MESSAGES for case in wrong(kind, SPECIAL)
    ]


@pytest.mark.parametrize("case", broken_messages())
def test_each_wrong_field_of_each_message_is_refused_by_name(case: Wrong) -> None:
    with pytest.raises(WireError) as refused:
        decode_frame(msgpack.packb([0, 1, 1, case.parts]), CAP)
    assert any(name in str(refused.value) for name in case.names)


@pytest.mark.parametrize("field", ["number", "source_generation", "target_generation"])
@pytest.mark.parametrize("value", [-1, 1 << 63, True, 1.0, "1", None, []])
def test_a_wrong_head_is_refused_by_name(field: str, value: object) -> None:
    parts: list[object] = [0, 1, 1, [5, ["r", 0, 1]]]
    parts[Frame.__struct_fields__.index(field)] = value
    with pytest.raises(WireError, match=field):
        decode_frame(msgpack.packb(parts), CAP)


@pytest.mark.parametrize("alien", UNPACKABLE, ids=repr)
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_map_or_an_extension_type_is_refused_in_every_field(kind: Any, alien: object) -> None:
    good = msgpack.unpackb(pack(Frame(0, 1, 1, sample(kind, SPECIAL))))
    for at in range(len(good[3])):
        parts = [*good[:3], [*good[3][:at], alien, *good[3][at + 1 :]]]
        with pytest.raises(WireError, match="not msgpack"):
            decode_frame(msgpack.packb(parts, datetime=True), CAP)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_are_a_legal_frame(data: bytes) -> None:
    try:
        frame = decode_frame(data, CAP)
    except WireError:
        return
    assert decode_frame(pack(frame), CAP) == frame


@given(frames, st.data())
def test_a_flipped_byte_never_raises_anything_but_wire_error(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(pack(frame))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        decode_frame(raw, CAP)


@given(frames, st.integers(1, 20))
def test_a_truncated_or_padded_frame_is_refused(frame: Frame, cut: int) -> None:
    raw = pack(frame)
    with pytest.raises(WireError):
        decode_frame(raw[:-cut], CAP)
    with pytest.raises(WireError):
        decode_frame(raw + b"\x00" * cut, CAP)


BOMBS = {
    "array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "string of 4 GB": b"\x94\x00\x01\x01\x92\x05\x93\xdb\xff\xff\xff\xff",
    "binary of 4 GB": b"\x94\x00\x01\x01\x92\x05\x93\xc6\xff\xff\xff\xff",
    "extension of 4 GB": b"\x94\x00\x01\x01\x92\x05\x93\xc9\xff\xff\xff\xff\x01",
    "50,000 nested arrays": b"\x91" * 50_000,
    "50,000 nested maps": b"\x81" * 50_000,
    "nested arrays of the allowed length": (b"\xdc\x01\x00" * 2000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_allocates_nothing(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WireError):
        decode_frame(BOMBS[name], CAP)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_an_oversized_frame_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(WireError, match="over the limit"):
        decode_frame(b"\xc0" * (CAP + 1), CAP)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "Frame: expected `array` of at least length 4, got 0"),
        (7, "Frame: expected `array`, got `int`"),
        ([9, 1, 1, [99, ["r", 0, 1]]], "Frame.message.kind: invalid value 99"),
        ([9, 1, 1, [True, ["r", 0, 1]]], "OfferMessage.kind: expected `int`, got `bool`"),
        ([9, -1, 1, [5, ["r", 0, 1]]], "Frame.source_generation: expected `int` >= 0, got -1"),
        ([9, 1, 1, [5, ["r" * 257, 0, 1]]], "AckMessage.handle.request_id: expected `str` of length <= 256, got str"),
        ([9, 1, 1, [2, ["r", 0, 1], 1, 0, 1]], "GrantMessage: first_tag must be a block tag, got 1"),
        ([9, 1, 1, [2, ["r", 0, 1], (1 << 64) - 1, 0, 1]], "first_tag must be a block tag"),
        ([9, 1, 1, [6, ["r", 0, 1], "why", 3]], "cause must be one of a cancellation, got CHECKSUM"),
        ([9, 1, 1, [9, ["r", 0, 1], 0, [1, -1]]], r"SumsMessage.sums\[1\]: expected `int` >= 0, got -1"),
        ([9, 1, 1, [8, 0, True, [["r", 0, 1], ["r", 0]]]], r"RenewMessage.handles\[1\]: expected `array` of at least"),
    ],
)  # fmt: skip
def test_a_refusal_says_which_field_breaks_which_rule(parts: Any, why: str) -> None:
    with pytest.raises(WireError, match=f"^{why}" if why[0].isupper() else why):
        decode_frame(msgpack.packb(parts), CAP)


P, D = PeerAddress("p", 3, "h", 1), PeerAddress("d", 7, "h", 2)
HANDLE = Handle("r", 0, 1)
SEQUENCE: list[Message] = [
    GrantMessage(HANDLE, 1 << 63, 0, 4),
    BlocksMessage(HANDLE, 0, 4),
    DoneMessage(HANDLE, 4, b"p"),
    AckMessage(HANDLE),
]


def end(address: PeerAddress) -> FrameNumbers:
    return FrameNumbers(address.generation, 1024)


class TestFrameNumbers:
    """What makes a late frame harmless: each is bound to both incarnations and has one place in its direction."""

    @pytest.mark.parametrize("message", SEQUENCE, ids=lambda m: type(m).__name__)
    def test_an_older_incarnations_word_is_refused_by_name(self, message: Message) -> None:
        old = end(PeerAddress("p", 2, "h", 1))
        with pytest.raises(WireError, match=r"frame from generation 2, session is with .*generation=3"):
            end(D).unpack(old.pack(message, D), P)

    @pytest.mark.parametrize("message", SEQUENCE, ids=lambda m: type(m).__name__)
    def test_a_word_to_an_older_incarnation_is_refused_by_name(self, message: Message) -> None:
        to_old = end(P).pack(message, PeerAddress("d", 6, "h", 2))
        with pytest.raises(WireError, match="frame for generation 6, this is 7"):
            end(D).unpack(to_old, P)

    def test_a_frame_that_is_lost_or_doubled_shows(self) -> None:
        sender, receiver = end(P), end(D)
        frames = [sender.pack(message, D) for message in SEQUENCE]
        assert receiver.unpack(frames[0], P) == SEQUENCE[0]
        with pytest.raises(WireError, match="frame 0 came where 1 was due"):
            receiver.unpack(frames[0], P)
        with pytest.raises(WireError, match="frame 2 came where 1 was due"):
            receiver.unpack(frames[2], P)
        assert [receiver.unpack(frame, P) for frame in frames[1:]] == SEQUENCE[1:]

    def test_before_the_handshake_nobody_is_heard(self) -> None:
        with pytest.raises(WireError, match="session is with None"):
            end(D).unpack(end(P).pack(SEQUENCE[0], D), None)

    @pytest.mark.parametrize(
        "message", [CancelMessage(HANDLE, "x" * 2000, Cause.FINISHED), FailMessage(HANDLE, "x" * 2000)]
    )
    def test_a_reason_that_is_too_long_is_cut(self, message: CancelMessage | FailMessage) -> None:
        heard = end(D).unpack(end(P).pack(message, D), P)
        assert heard == structs.replace(message, reason="x" * 1024)
