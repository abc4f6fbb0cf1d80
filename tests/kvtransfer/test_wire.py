"""Guards the control decoder: what is legal comes back equal, and no bytes of a stranger do more than be refused."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.kvtransfer.messages import Cause
from kvbaton.kvtransfer.wire import (
    BLOCK_TAG,
    MAX_SUMS,
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    Frame,
    GrantMessage,
    Handle,
    OfferMessage,
    RenewMessage,
    SumsMessage,
    WireError,
    decode,
    encode,
)

CAP = 1 << 16

handles = st.builds(Handle, st.text(max_size=40), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1))
counts = st.integers(0, 2**24 - 1)
messages = st.one_of(
    st.builds(OfferMessage, handles, st.integers(0, 2**32 - 1), counts),
    st.builds(GrantMessage, handles, st.integers(BLOCK_TAG, 2**64 - 2**24 - 1), counts, counts),
    st.builds(BlocksMessage, handles, counts, counts),
    st.builds(
        SumsMessage, handles, counts, st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=MAX_SUMS).map(tuple)
    ),
    st.builds(DoneMessage, handles, counts, st.binary(max_size=100)),
    st.builds(AckMessage, handles),
    st.builds(CancelMessage, handles, st.text(max_size=50), st.sampled_from((Cause.CANCELLED, Cause.FINISHED))),
    st.builds(FailMessage, handles, st.text(max_size=50)),
    st.builds(RenewMessage, st.integers(0, 2**63 - 1), st.booleans(), st.lists(handles, max_size=5).map(tuple)),
)
frames = st.builds(Frame, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), messages)


@given(frames)
def test_every_message_comes_back_equal(frame: Frame) -> None:
    assert decode(encode(frame), CAP) == frame


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_are_a_legal_frame(data: bytes) -> None:
    try:
        frame = decode(data, CAP)
    except WireError:
        return
    assert decode(encode(frame), CAP) == frame


@given(frames, st.data())
def test_a_flipped_byte_never_raises_anything_but_wire_error(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(encode(frame))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        decode(raw, CAP)


@given(frames, st.integers(1, 20))
def test_a_truncated_or_padded_frame_is_refused(frame: Frame, cut: int) -> None:
    raw = encode(frame)
    with pytest.raises(WireError):
        decode(raw[:-cut], CAP)
    with pytest.raises(WireError):
        decode(raw + b"\x00" * cut, CAP)


BOMBS = {
    "array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "string of 4 GB": b"\x95\x05\x00\x01\x01\xdb\xff\xff\xff\xff",
    "binary of 4 GB": b"\x95\x05\x00\x01\x01\xc6\xff\xff\xff\xff",
    "extension of 4 GB": b"\x95\x05\x00\x01\x01\xc9\xff\xff\xff\xff\x01",
    "50,000 nested arrays": b"\x91" * 50_000,
    "50,000 nested maps": b"\x81" * 50_000,
    "nested arrays of the allowed length": (b"\xdc\x03\x00" * 2000),
    "timestamp extension": msgpack.packb([5, 9, 1, 1, msgpack.Timestamp(1, 1)]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_allocates_nothing(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WireError):
        decode(BOMBS[name], CAP)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_an_oversized_frame_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(WireError, match="over the limit"):
        decode(b"\xc0" * (CAP + 1), CAP)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "at least 4"),
        ({}, "not msgpack|expected an array"),
        ([99, 9, 1, 1, "r", 0, 1], "unknown message type 99"),
        ([True, 9, 1, 1, "r", 0, 1], "unsigned"),
        ([5, 9, -1, 1, "r", 0, 1], "unsigned"),
        ([5, 9, 1, 1, "r", 0], "fields"),
        ([5, 9, 1, 1, "r", 0, 1, 2], "fields"),
        ([5, 9, 1, 1, b"r", 0, 1], "string"),
        ([5, 9, 1, 1, "r" * 257, 0, 1], "string"),
        ([5, 9, 1, 1, "r", 0.5, 1], "unsigned"),
        ([1, 9, 1, 1, "r", 0, 1, 16, 1 << 24], "unsigned 24"),
        ([2, 9, 1, 1, "r", 0, 1, 1, 0, 1], "block tag"),
        ([2, 9, 1, 1, "r", 0, 1, (1 << 64) - 1, 0, 1], "block tag"),
        ([4, 9, 1, 1, "r", 0, 1, 2, "text"], "bytes"),
        ([9, 9, 1, 1, "r", 0, 1, 0, 7], "list of 1 to 32"),
        ([9, 9, 1, 1, "r", 0, 1, 0, []], "list of 1 to 32"),
        ([9, 9, 1, 1, "r", 0, 1, 0, [7] * 33], "list of 1 to 32"),
        ([9, 9, 1, 1, "r", 0, 1, 0, [1, -1]], "unsigned 64"),
        ([9, 9, 1, 1, "r", 0, 1, 0, [[1]]], "unsigned 64"),
        ([6, 9, 1, 1, "r", 0, 1, "why", 2], "cause"),
        ([6, 9, 1, 1, "r", 0, 1, "why", True], "cause"),
        ([6, 9, 1, 1, "r", 0, 1, "why"], "fields"),
        ([8, 9, 1, 1, 0, 1, []], "boolean"),
        ([8, 9, 1, 1, 0, True, ["r", 0]], "handles"),
        ([8, 9, 1, 1, 0, True, [["r", 0, 1]] * 3], "string"),
    ],
)
def test_each_rule_of_a_field_is_checked_and_named(parts: Any, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode(msgpack.packb(parts), CAP)
