"""Guards the strict codec's own rules, on messages that exist here only: whole arrays, right names, small refusals."""

from __future__ import annotations

from typing import Annotated

import msgpack
import pytest
from msgspec import Meta, Struct

from kvbaton.kvtransfer.codec import WireError, convert, decode, pack, unpack


class Point(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    x: Annotated[int, Meta(ge=0)]
    y: float = 0.5


class Path(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    name: Annotated[str, Meta(max_length=8)]
    points: tuple[Point | None, ...]
    start: Point | None = None


class Mark(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    color: str


class Label(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    text: str
    at: Point = Point(0)


class Drawing(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    items: tuple[Path | Mark | Label, ...]


WHOLE = Drawing((Path("p", (None, Point(1, 2.0)), Point(3)), Mark("red"), Label("l")))
PARTS = [[[1, "p", [None, [1, 2.0]], [3, 0.5]], [2, "red"], [4, "l", [0, 0.5]]]]


def test_a_message_is_its_fields_in_order() -> None:
    assert msgpack.unpackb(pack(WHOLE)) == PARTS
    assert decode(pack(WHOLE), Drawing, 100, 10) == WHOLE


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ([1, "p", []], "Path has 4 fields, got 3"),
        ([1, "p", [None, [1]], None], "Point has 2 fields, got 1"),
        ([1, "p", [], [1]], "Point has 2 fields, got 1"),
        ([4, "l"], "Label has 3 fields, got 2"),
        ([4, "l", [1]], "Point has 2 fields, got 1"),
    ],
)
def test_a_field_that_has_a_default_in_code_may_not_be_missing(item: list[object], why: str) -> None:
    """msgspec alone lets an array end where only defaults follow: two versions would then read it differently."""
    with pytest.raises(WireError, match=why):
        convert([[[2, "red"], item]], Drawing)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([[[1, "p", [None, [1, "2"]], None]]], "Path.points[1].y: expected `float`, got `str`"),
        ([[[1, "p", [[-1, 2.0]], None]]], "Path.points[0].x: expected `int` >= 0, got -1"),
        ([[[1, "p" * 9, [], None]]], "Path.name: expected `str` of length <= 8, got str of 9"),
        ([[[3, "red"]]], "Drawing.items[0].kind: invalid value 3"),
        ([[[2, "red"], 7]], "Drawing.items[1]: expected `array`, got `int`"),
        ([[[2, "red"], []]], "Drawing.items[1]: expected `array` of at least length 1, got 0"),
    ],
)
def test_a_refusal_names_the_field_and_the_value(parts: object, why: str) -> None:
    with pytest.raises(WireError) as refused:
        convert(parts, Drawing)
    assert str(refused.value) == why


def test_a_refusal_is_short_whatever_was_sent() -> None:
    for value in ("x" * (1 << 20), b"x" * (1 << 20), msgpack.unpackb(b"\x91" * 500 + b"\x90"), [0] * 100_000):
        with pytest.raises(WireError) as refused:
            convert([[[2, value]]] if not isinstance(value, str) else [[[1, value, [], None]]], Drawing)
        assert len(str(refused.value)) < 100


def test_caps_are_checked_before_anything_is_made() -> None:
    with pytest.raises(WireError, match="11 bytes are over the limit of 10"):
        unpack(bytes(11), 10, 10)
    with pytest.raises(WireError, match="not msgpack"):
        unpack(msgpack.packb([0] * 11), 100, 10)
    assert unpack(msgpack.packb([0] * 10), 100, 10) == [0] * 10
