"""What a setting is. Its default, range, unit and meaning stand once, on the field of the frozen class that uses it.

    @dataclass(frozen=True, slots=True)
    class TransferConfig:
        lease_s: Annotated[float, Interval(ge=0.001, le=86400), Setting("transfer.lease_s", "how long ...")] = 10.0

        def __post_init__(self) -> None:
            check(self)

A field with `Setting` is for operators: the reader of the cluster's file, the flags, deploy/cluster.yaml and the table in
docs/operators.md are made from these annotations. One without is for whoever builds the object, and checked alike.
Bounds are annotated_types' `Interval` and `Ge`, inclusive; choices are a `Literal`; `BYTES` marks a size; None is "unset".

Every component may import this module, which imports none.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Interval, Unit

BYTES = Unit("bytes")
Seconds = Annotated[float, Interval(ge=0.001, le=86400.0)]
Count = Annotated[int, Ge(1)]

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list of texts",
}


class ConfigError(ValueError):
    """A setting that cannot work; the message says which one and what to do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Marks what operators set. `path` is "section.key" in the cluster's file; `unset` says what None comes to."""

    path: str
    meaning: str
    unset: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values a field may have: of `kind` and between the bounds, or one of `words`, or None where `optional`."""

    kind: type
    words: tuple[str, ...] = ()
    low: float = -inf
    high: float = inf
    is_size: bool = False
    optional: bool = False

    @classmethod
    def of(cls, hint: object) -> Rule | None:
        """What an annotation allows; None where it is of a kind that settings do not have."""
        leaves, marks = _unfolded(hint)
        words = tuple(word for leaf in leaves if get_origin(leaf) is Literal for word in get_args(leaf))
        kinds = [get_origin(leaf) or leaf for leaf in leaves if get_origin(leaf) is not Literal]
        kinds = [kind for kind in kinds if kind is not types.NoneType] or [str]
        if len(kinds) != 1 or kinds[0] not in _EXPECTED:
            return None
        low: Any = next((mark.ge for mark in marks if isinstance(mark, Ge | Interval)), None)
        high: Any = next((mark.le for mark in marks if isinstance(mark, Interval)), None)
        return cls(
            kind=kinds[0],
            words=words,
            low=-inf if low is None else low,
            high=inf if high is None else high,
            is_size=BYTES in marks,
            optional=types.NoneType in leaves,
        )

    @property
    def expected(self) -> str:
        """The kind of value, in words."""
        words = [f"'{word}'" for word in self.words] if self.kind is not str else []
        return " or ".join([_EXPECTED[self.kind], *words])

    @property
    def bounds(self) -> str:
        """Such as "from 1 to 512" or "at least 1"; empty where there are none."""
        if self.high < inf:
            return f"from {self.low:g} to {self.high:.10g}"
        if self.is_size:
            return f"at least {self.low} bytes"
        return f"at least {self.low:g}" if self.low > -inf else ""

    @property
    def allowed(self) -> str:
        """The values, for people: "auto, cpu or cuda", "from 1 to 512"."""
        kinds = [] if self.kind is str and self.words else [_EXPECTED[self.kind]]
        if self.is_size:
            kinds = [f"a size of at least {size_text(int(self.low))}" if self.low > 0 else "a size"]
        elif self.bounds:
            kinds = [self.bounds]
        *most, last = [*self.words, *kinds]
        return f"{', '.join(most)} or {last}" if most else last

    def refusal(self, value: object) -> str | None:
        """Why a value is not allowed, or None."""
        if (value is None and self.optional) or (isinstance(value, str) and value in self.words):
            return None
        if not self._is_kind(value):
            return f"expected {self.expected}, got {shown(value)}"
        if self.words:
            return self._not_a_word(str(value)) if self.kind is str else self._out_of_bounds(value)
        return self._out_of_bounds(value)

    def _is_kind(self, value: object) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        return isinstance(value, int | float if self.kind is float else self.kind)

    def _out_of_bounds(self, value: object) -> str | None:
        if not isinstance(value, int | float) or self.low <= value <= self.high:
            return None
        return f"must be {self.bounds}, got {value}"

    def _not_a_word(self, value: str) -> str:
        near = difflib.get_close_matches(value, self.words, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"must be one of {', '.join(self.words)}, got '{value}'{hint}"


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a settings class. `setting` None: operators do not set it."""

    name: str
    rule: Rule
    default: object
    setting: Setting | None

    @property
    def label(self) -> str:
        return self.setting.path if self.setting else self.name


@functools.cache
def fields_of(kind: type) -> tuple[Field, ...]:
    """The fields of a settings class that have a rule, in order; those of its parts not among them."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for item in dataclasses.fields(kind):
        rule = Rule.of(hints[item.name])
        if rule is not None:
            setting = next((mark for mark in _unfolded(hints[item.name])[1] if isinstance(mark, Setting)), None)
            found.append(Field(item.name, rule, item.default, setting))
    return tuple(found)


@functools.cache
def parts_of(kind: type) -> tuple[tuple[str, type], ...]:
    """The fields that are settings classes themselves: (name, class)."""
    hints = get_type_hints(kind)
    named = ((item.name, hints[item.name]) for item in dataclasses.fields(kind))
    return tuple((name, hint) for name, hint in named if dataclasses.is_dataclass(hint) and isinstance(hint, type))


def operator_fields(kind: type) -> Iterator[tuple[Setting, Field]]:
    """Everything in a class and its parts that operators set."""
    for field in fields_of(kind):
        if field.setting is not None:
            yield field.setting, field
    for _, part in parts_of(kind):
        yield from operator_fields(part)


def check(config: object) -> None:
    """Raise `ConfigError` for the first field whose value its annotation does not allow."""
    for field in fields_of(type(config)):  # type: ignore[arg-type]  # classes are hashable, whatever mypy says
        refusal = field.rule.refusal(getattr(config, field.name))
        if refusal is not None:
            raise ConfigError(f"{field.label}: {refusal}")


def written(field: Field) -> str:
    """A field's default as it stands in a file."""
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, int) and field.rule.is_size:
        return size_text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def size_text(size: int) -> str:
    """Bytes in the largest unit that divides them: 67108864 is "64MiB"."""
    power = min(4, ((size & -size).bit_length() - 1) // 10) if size else 0
    return f"{size >> 10 * power}{('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def shown(value: object) -> str:
    """How a value reads in an error message."""
    names = {dict: "a mapping", list: "a list", tuple: "a list", type(None): "nothing"}
    return names.get(type(value)) or (f"'{value}'" if isinstance(value, str) else str(value))


def _unfolded(hint: object) -> tuple[list[Any], list[object]]:
    """The plain types of an annotation, and the marks on them, through any unions."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *marks = get_args(hint)
        leaves, more = _unfolded(inner)
        return leaves, [*more, *marks]
    if origin in (Union, types.UnionType):
        pairs = [_unfolded(argument) for argument in get_args(hint)]
        return [leaf for leaves, _ in pairs for leaf in leaves], [mark for _, marks in pairs for mark in marks]
    return [hint], []
