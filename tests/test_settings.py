"""Annotations as rules: what each kind allows, how that reads, and that objects are checked when they are built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Interval

from kvbaton.settings import BYTES, ConfigError, Rule, Setting, check, fields_of, operator_fields, size_text

SIZE = Annotated[int, BYTES, Ge(1 << 20)]
NUMBER_OR_AUTO = Annotated[int | Literal["auto"] | None, Interval(ge=1, le=9)]


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (bool, "true or false"),
        (Literal["on", "off", "auto"], "on, off or auto"),
        (Annotated[float, Interval(ge=0.01, le=1)], "from 0.01 to 1"),
        (Annotated[int, Ge(1)] | None, "at least 1"),
        (NUMBER_OR_AUTO, "auto or from 1 to 9"),
        (SIZE, "a size of at least 1MiB"),
        (Annotated[int, BYTES, Ge(0)], "a size"),
        (Path, "a path"),
        (tuple[str, ...], "a list of texts"),
    ],
)
def test_what_is_allowed_reads_well(hint: object, text: str) -> None:
    rule = Rule.of(hint)
    assert rule is not None
    assert rule.allowed == text


@pytest.mark.parametrize(
    ("hint", "value", "refusal"),
    [
        (int, 3, None),
        (int, True, "expected a whole number, got True"),
        (float, 3, None),
        (float, "3", "expected a number, got '3'"),
        (Annotated[float, Ge(0)], float("nan"), "must be at least 0, got nan"),
        (SIZE, 1000, "must be at least 1048576 bytes, got 1000"),
        (NUMBER_OR_AUTO, "auto", None),
        (NUMBER_OR_AUTO, None, None),
        (NUMBER_OR_AUTO, 10, "must be from 1 to 9, got 10"),
        (NUMBER_OR_AUTO, "atuo", "expected a whole number or 'auto', got 'atuo'"),
        (Literal["on", "off"], "onn", "must be one of on, off, got 'onn'; did you mean 'on'?"),
        (Literal["on", "off"], None, "expected text, got nothing"),
        (tuple[str, ...], {}, "expected a list of texts, got a mapping"),
    ],
)
def test_what_is_not_allowed_is_named(hint: object, value: object, refusal: str | None) -> None:
    rule = Rule.of(hint)
    assert rule is not None
    assert rule.refusal(value) == refusal


def test_other_kinds_have_no_rule() -> None:
    """Guards fields that are no settings: addresses, nested objects."""
    assert [Rule.of(hint) for hint in (bytes, dict[str, int], int | str)] == [None] * 3


@dataclass(frozen=True, slots=True)
class Inner:
    cap: Annotated[int, Ge(1)] = 4
    size: Annotated[SIZE, Setting("part.size", "how large")] = 2 << 20

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Outer:
    word: Annotated[Literal["a", "b"], Setting("whole.word", "which one")] = "a"
    inner: Inner = Inner()


def test_parts_are_found_and_what_is_not_for_operators_is_not() -> None:
    assert [setting.path for setting, _ in operator_fields(Outer)] == ["whole.word", "part.size"]
    assert [field.label for field in fields_of(Inner)] == ["cap", "part.size"]


def test_objects_are_checked_when_they_are_built() -> None:
    """Guards `replace`, and whoever builds a component without a file."""
    with pytest.raises(ConfigError, match=r"^cap: must be at least 1, got 0$"):
        replace(Inner(), cap=0)
    with pytest.raises(ConfigError, match=r"^part\.size: must be at least 1048576 bytes, got 1$"):
        Inner(size=1)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1000, "1000"), (1536, "1536"), (3 << 19, "1536KiB"), (1 << 50, "1024TiB")]
)
def test_sizes_read_back(size: int, text: str) -> None:
    assert size_text(size) == text
