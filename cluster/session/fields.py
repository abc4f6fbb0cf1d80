"""Checks of single wire fields: the value comes back with its type proven, or `WireError` names the field."""

from __future__ import annotations

from typing import Any


class WireError(ValueError):
    """Bytes that are no message of this protocol; says which field is wrong."""


def sized(name: str, fields: object, size: int) -> list[Any]:
    if type(fields) is not list or len(fields) != size:
        raise WireError(f"{name} must be a list of {size} fields")
    return fields


def text(name: str, value: object, max_chars: int) -> str:
    if type(value) is not str or len(value) > max_chars:
        raise WireError(f"{name} must be a string of at most {max_chars} characters")
    return value


def natural(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise WireError(f"{name} must be an integer >= 0, got {value!r:.40}")
    return value


def index_below(name: str, value: object, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise WireError(f"{name} must be an integer in [0, {limit}), got {value!r:.40}")
    return value


def number(name: str, value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise WireError(f"{name} must be a number, got {value!r:.40}")
    return float(value)
