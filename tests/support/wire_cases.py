"""What a declared message may hold, and all the ways in which it may be wrong, made from its declaration alone.

`legal` gives hypothesis any message of a type; `sample` one whose optional fields are all set; `wrong` every way to
break one field of that, or the number of fields, at every depth.
"""

from __future__ import annotations

import enum
import hashlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import msgspec
from hypothesis import strategies as st

from kvbaton.kvtransfer.codec import parts_of

Special = Mapping[str, Any]  # for fields with a rule of their own: the name, and a value
DEEP = msgpack.unpackb(b"\x91" * 100 + b"\x90")
JUNK: tuple[Any, ...] = (None, True, 7, -7, 1 << 63, 1.5, "text", b"bytes", [], [[]], DEEP)
UNPACKABLE: tuple[Any, ...] = ({}, {"a": 1}, msgpack.ExtType(5, b""), msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 1))


@dataclass(frozen=True, slots=True)
class Wrong:
    """`parts` are no message; the refusal must contain one of `names`: the field's, or that of a type which is cut."""

    label: str
    names: tuple[str, ...]
    parts: Any

    def within(self, around: list[Any], at: int, label: str = "") -> Wrong:
        """The same fault in item `at` of `around`."""
        return Wrong(f"{label}{self.label}", self.names, [*around[:at], self.parts, *around[at + 1 :]])


@dataclass(frozen=True, slots=True)
class Bounds:
    """A type without its `Annotated`, and what that says."""

    kind: Any
    meta: msgspec.Meta

    @classmethod
    def of(cls, kind: Any) -> Bounds:
        if get_origin(kind) is Annotated:
            return cls(*get_args(kind)[:2])
        return cls(kind, msgspec.Meta())

    @property
    def low(self) -> int:
        return -(1 << 63) if self.meta.ge is None else int(self.meta.ge)

    @property
    def high(self) -> int:
        if self.meta.lt is not None:
            return int(self.meta.lt) - 1
        return (1 << 64) - 1 if self.meta.le is None else int(self.meta.le)


def legal(kind: Any, special: Special) -> st.SearchStrategy[Any]:
    """Any value of the declared type; a `special` field only ever has its one value."""
    bounds = Bounds.of(kind)
    kind, meta = bounds.kind, bounds.meta
    size = {"min_size": meta.min_length or 0, "max_size": min(meta.max_length or 20, max(20, meta.min_length or 0))}
    if is_struct(kind):
        fields = hints(kind).items()
        chosen = {name: st.just(special[name]) if name in special else legal(hint, special) for name, hint in fields}
        return st.builds(kind, **chosen)
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of(*(legal(member, special) for member in get_args(kind)))
    if get_origin(kind) in (tuple, list):
        items = get_args(kind)
        if get_origin(kind) is list:
            return st.lists(legal(items[0], special), **size)
        if items[-1] is Ellipsis:
            return st.lists(legal(items[0], special), **size).map(tuple)
        return st.tuples(*(legal(item, special) for item in items))
    plain: dict[Any, Any] = {
        int: lambda: st.integers(bounds.low, bounds.high),
        float: lambda: st.floats(meta.ge, meta.le, exclude_min=False, allow_nan=False) | st.just(meta.ge or 0.0),
        str: lambda: st.text(**size),
        bytes: lambda: st.binary(**size),
        bool: st.booleans,
        type(None): st.none,
    }
    return plain[kind]() if kind in plain else st.sampled_from(choices(kind))


def sample(kind: Any, special: Special) -> Any:
    """One value of the type, nothing of it None or empty."""
    bounds = Bounds.of(kind)
    kind = bounds.kind
    if is_struct(kind):
        fields = hints(kind).items()
        return kind(**{name: special.get(name) or sample(hint, special) for name, hint in fields})
    if get_origin(kind) in (Union, types.UnionType):
        return sample(member_of(kind), special)
    if get_origin(kind) in (tuple, list):
        items = [item for item in get_args(kind) if item is not Ellipsis]
        return get_origin(kind)(sample(item, special) for item in items)
    length = max(1, bounds.meta.min_length or 0)
    plain: dict[Any, Any] = {
        int: max(1, bounds.low),
        float: 1.5,
        str: "x" * length,
        bytes: b"x" * length,
        bool: True,
    }
    return plain[kind] if kind in plain else choices(kind)[0]


def wrong(kind: type[msgspec.Struct], special: Special) -> list[Wrong]:
    """Every way to break `sample(kind)`, one at a time."""
    return list(_wrong_struct(kind, parts_of(sample(kind, special))))


def _wrong_struct(kind: Any, good: list[Any]) -> Iterator[Wrong]:
    first = int(kind.__struct_config__.tag is not None)
    for size in range(first, len(good)):
        yield Wrong(f"{kind.__name__} of {size}", (kind.__name__,), good[:size])
    yield Wrong(f"{kind.__name__} and more", (kind.__name__,), [*good, None])
    for at, (name, hint) in enumerate(hints(kind).items(), first):
        for broken in _wrong_value(name, hint, good[at]):
            yield broken.within(good, at)


def _wrong_value(name: str, hint: Any, good: Any) -> Iterator[Wrong]:
    """`parts` of what this yields is the value of one field."""
    kind = member_of(Bounds.of(hint).kind)
    for junk in JUNK:
        if not could_be(hint, junk):  # an array that is too short may be named by what it should be
            yield Wrong(f"{name} = {str(junk)[:20]}", (name, kind.__name__) if is_struct(kind) else (name,), junk)
    for outside in _outside(hint, good):
        yield Wrong(f"{name} out of bounds: {str(outside)[:20]}", (name,), outside)
    if is_struct(kind):
        for broken in _wrong_struct(kind, good):
            cut = (name,) if broken.names == (kind.__name__,) else ()
            yield Wrong(f"{name}.{broken.label}", broken.names + cut, broken.parts)
    elif get_origin(kind) in (tuple, list):
        for at, (item, value) in enumerate(zip(get_args(kind), good, strict=False)):
            for broken in _wrong_value(name, item, value):
                yield broken.within(good, at, f"{name}[{at}]: ")


def _outside(hint: Any, good: Any) -> Iterator[Any]:
    for member in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        bounds = Bounds.of(member)
        meta = bounds.meta
        if meta.ge is not None:
            yield meta.ge - 1
        if bounds.high < (1 << 64) - 1 and bounds.kind is int:
            yield bounds.high + 1
        if meta.max_length is not None:
            yield good[:1] * (meta.max_length + 1)
        if meta.min_length:
            yield good[: meta.min_length - 1]
        if isinstance(bounds.kind, type) and issubclass(bounds.kind, enum.Enum):
            yield "none of these" if isinstance(choices(bounds.kind)[0], str) else 99


def could_be(hint: Any, value: Any) -> bool:
    """Whether msgpack's `value` has the type that stands in a field, whatever its bounds."""
    kind = Bounds.of(hint).kind
    if get_origin(kind) in (Union, types.UnionType):
        return any(could_be(member, value) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return type(value) is type(get_args(kind)[0])
    if get_origin(kind) in (tuple, list):
        return value == [] and (get_origin(kind) is list or get_args(kind)[-1] is Ellipsis)
    if is_struct(kind):
        return False
    if issubclass(kind, enum.Enum):
        return type(value) is type(choices(kind)[0].value)
    return type(value) is kind or (kind is float and type(value) is int)


def member_of(kind: Any) -> Any:
    """What an optional field holds where it is set."""
    if get_origin(kind) in (Union, types.UnionType):
        return Bounds.of(next(member for member in get_args(kind) if member is not type(None))).kind
    return kind


def choices(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) is Literal else list(kind)


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def fields_of(messages: Any) -> dict[str, tuple[str, ...]]:
    """Each message and each struct in one -> its number, if it has one, and its fields in order."""
    found: dict[str, tuple[str, ...]] = {}
    left = list(messages)
    while left:
        kind = left.pop()
        if get_origin(kind) is not None:
            left += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__name__ not in found:
            tag = kind.__struct_config__.tag
            found[kind.__name__] = (*(() if tag is None else (f"={tag}",)), *kind.__struct_fields__)
            left += get_type_hints(kind, include_extras=True).values()
    return found


def digest_of(messages: Any) -> str:
    """Of the order of the messages and of all their fields: another one means other bytes on the wire."""
    lines = [" ".join(kind.__name__ for kind in messages)]
    lines += [f"{name}: {' '.join(fields)}" for name, fields in sorted(fields_of(messages).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
