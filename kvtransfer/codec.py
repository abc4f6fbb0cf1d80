"""Strict msgpack: declared messages to bytes and back, for all that crosses a socket or lies in the store.

A message is a frozen `msgspec.Struct` that travels as an array: its fields in order, each with its type and, in
`Annotated`, its bounds. Bytes are taken apart by msgpack, which knows no map and no extension type here and allocates
no more than they can fill; `convert` then makes the message, or raises `WireError` that names the field. Nothing is
coerced but an integer to a float, and no field may be missing or too many, one with a default in code included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack
import msgspec

Unsigned24 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
Unsigned32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Unsigned63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Unsigned64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack itself has no longer ones

_INDEX = re.compile(r"\[(\d+)\]")
_UNIONS = (Union, type(int | None))
T = TypeVar("T", bound=msgspec.Struct)
_LengthCheck = Callable[[Any], None]


class WireError(ValueError):
    """Bytes that are no message of this protocol version; the text says which field breaks which rule."""


def pack(message: msgspec.Struct) -> bytes:
    """The bytes of `message`."""
    packed: bytes = msgpack.packb(parts_of(message))
    return packed


def parts_of(message: msgspec.Struct | list[Any]) -> list[Any]:
    """What msgpack packs for a message, or for a list of them: the fields in order, nested ones as lists, too."""
    parts: list[Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return parts


def unpack(data: bytes | bytearray, max_bytes: int, max_items: int) -> Any:
    """One msgpack value of at most `max_bytes`, with arrays of at most `max_items`, and nothing behind it.

    Raises WireError. msgpack bounds the depth of nesting itself.
    """
    if len(data) > max_bytes:
        raise WireError(f"{len(data)} bytes are over the limit of {max_bytes}")
    try:
        return msgpack.unpackb(
            data,
            max_array_len=min(len(data), max_items),
            max_map_len=0,
            max_ext_len=0,
            object_hook=_refuse,
            ext_hook=_refuse,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {str(error)[:80] or type(error).__name__}") from None


def convert(parts: object, kind: type[T]) -> T:
    """The message of type `kind` whose fields `unpack` has found. Raises WireError."""
    try:
        message = msgspec.convert(parts, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise WireError(_named(kind, parts, str(error))) from None
    check_lengths = _length_check(kind)
    if check_lengths is not None:
        check_lengths(parts)
    return message


def decode(data: bytes | bytearray, kind: type[T], max_bytes: int, max_items: int) -> T:
    """`unpack` and `convert`."""
    return convert(unpack(data, max_bytes, max_items), kind)


def _refuse(*_: object) -> None:
    raise ValueError("maps and extension types have no place here")


# ---- lengths: msgspec lets an array end early where the other fields have defaults --------------------------------


@cache
def _length_check(kind: Any) -> _LengthCheck | None:
    """What raises WireError where a Struct in a value of type `kind` lacks fields; None where none may be left out."""
    checks = [check for member in _members(kind) if (check := _member_check(member)) is not None]
    if len(checks) < 2:
        return checks[0] if checks else None

    def check_each(parts: list[Any]) -> None:
        for check in checks:
            check(parts)

    return check_each


def _member_check(member: Any) -> _LengthCheck | None:
    if _is_struct(member):
        return _struct_check(member)
    item_check = _length_check(get_args(member)[0]) if get_origin(member) in (tuple, list) else None
    if item_check is None:
        return None

    def check_items(items: list[Any]) -> None:
        for item in items:
            if item is not None:
                item_check(item)

    return check_items


def _struct_check(member: type[msgspec.Struct]) -> _LengthCheck | None:
    first = _first_field(member)
    inner = [(i, check) for i, hint in enumerate(_hints(member).values(), first) if (check := _length_check(hint))]
    if not inner and not member.__struct_defaults__:
        return None
    size, tag = first + len(member.__struct_fields__), member.__struct_config__.tag

    def check_struct(parts: list[Any]) -> None:
        if tag is not None and parts[0] != tag:
            return  # another type of a union
        if len(parts) != size:
            raise WireError(f"{member.__name__} has {size} fields, got {len(parts)}")
        for index, check_field in inner:
            if parts[index] is not None:
                check_field(parts[index])

    return check_struct


# ---- names: msgspec says where in the arrays a value is wrong, people want to know which field that is --------------


def _named(kind: Any, value: Any, error: str) -> str:
    """`error` with field names for indices, and with the value that is wrong."""
    rule, _, path = error.partition(" - at `$")
    names = [kind.__name__]
    kind = _choose(kind, value)
    for index in [*map(int, _INDEX.findall(path)), None]:
        if _is_struct(kind) and kind.__struct_config__.tag is not None:
            names = [kind.__name__]
        if index is None:
            break
        name, kind = _field(kind, index)
        names.append(name)
        value = value[index]
        kind = _choose(kind, value)
    shown = "" if ", got " in rule or rule.startswith("Invalid") else f", got {_show(value)}"
    return f"{'.'.join(names)}: {rule[:1].lower()}{rule[1:]}{shown}".replace(".[", "[")


def _field(kind: Any, index: int) -> tuple[str, Any]:
    """Name and type of one item of an array of type `kind`, None for a message of no known kind."""
    if _is_struct(kind):
        fields: list[tuple[str, Any]] = [("kind", int)] * _first_field(kind) + list(_hints(kind).items())
        return fields[index]
    if kind is None:
        return "kind", None
    items = get_args(kind)
    fixed = get_origin(kind) is tuple and items[-1] is not Ellipsis
    return f"[{index}]", items[index if fixed else 0]


def _choose(kind: Any, value: Any) -> Any:
    """Which of the types that `kind` allows `value` is meant to have; None where it is none of them, or no array."""
    if not isinstance(value, list):
        return None
    arrays = [member for member in _members(kind) if _is_struct(member) or get_origin(member) in (tuple, list)]
    if len(arrays) < 2:
        return arrays[0] if arrays else None
    return next((member for member in arrays if value and member.__struct_config__.tag == value[0]), None)


def _members(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    return tuple(m for arg in get_args(kind) for m in _members(arg)) if get_origin(kind) in _UNIONS else (kind,)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _first_field(kind: Any) -> int:
    """Where in the array the first field stands: behind the number of its type, if it has one."""
    return int(kind.__struct_config__.tag is not None)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _show(value: Any) -> str:
    sized = isinstance(value, str | bytes | list)
    return f"{type(value).__name__} of {len(value)}" if sized else repr(value)
