"""Typed reading of a JSON object from a file: a missing field or wrong type is a `ConfigError` with file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from kvbaton.settings import ConfigError

T = TypeVar("T")


class JsonFields:
    """One JSON object. A value of null counts as absent, except to `is_null`."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self._where = where
        self._values = values

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """Parse a file that must hold one JSON object."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return cls.parse(str(path), text)

    @classmethod
    def parse(cls, where: str, text: bytes) -> JsonFields:
        """`where` is named in every error."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must hold a JSON object, got {type(values).__name__}")
        return cls(where, values)

    def names(self) -> tuple[str, ...]:
        """Every name that has a value."""
        return tuple(name for name in self._values if self.has(name))

    def names_other(self, name: str, neutral: tuple[object, ...]) -> bool:
        """Whether there is a value of that name, and none of `neutral`."""
        return self.has(name) and self._values[name] not in neutral

    def error(self, message: str) -> ConfigError:
        """An exception that names this file."""
        return ConfigError(f"{self._where}: {message}")

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        return name in self._values and self._values[name] is None

    def optional_integer(self, name: str) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        return self._required(name, self.optional_integer(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._wrong(name, "a number")
        return float(self._required(name, value, default))

    def string(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return self._required(name, value, default)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return default if value is None else value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of integers; absent is empty."""
        value = self._values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self._wrong(name, "an integer or a list of integers")
        return tuple(items)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers; absent is empty."""
        value = self._values.get(name)
        items = [] if value is None else value
        if not isinstance(items, list) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in items):
            raise self._wrong(name, "a list of numbers")
        return tuple(map(float, items))

    def section(self, name: str) -> JsonFields | None:
        """A nested object, None when absent or empty."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return JsonFields(f"{self._where}: {name}", value) if value else None

    def empty_section(self, name: str) -> JsonFields:
        return JsonFields(f"{self._where}: {name}", {})

    def _required(self, name: str, value: T | None, default: T | None) -> T:
        chosen = default if value is None else value
        if chosen is None:
            raise self.error(f"{name} is missing")
        return chosen

    def _wrong(self, name: str, expected: str) -> ConfigError:
        return self.error(f"{name} must be {expected}, got {self._values[name]!r}")
