"""Reads a `ClusterConfig` from YAML and command-line flags, strictly.

A misspelt key is an error that names the nearest right one; a wrong type or a value out of range is an error that names
the path and what was expected; a key given twice is an error. Flags override the file and obey the same rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from kvbaton.cluster.config.cluster_config import ByteSize, ClusterConfig, NumberOr, OneOf, Range
from kvbaton.engine.config import ConfigError

T = TypeVar("T")

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in list(_UNITS.items()) if unit not in ("", "b")}
_UNITS |= {f"{unit}i{b}": 1 << (10 * power) for power, unit in enumerate("kmgt", 1) for b in ("", "b")}


@dataclass(frozen=True, slots=True)
class Override:
    """One flag: `path` is dotted ("pools.prefill"), `source` names the flag in error messages."""

    path: str
    value: object
    source: str


def load_config(path: Path | None, overrides: Iterable[Override] = ()) -> ClusterConfig:
    """The defaults, then the file, then the flags. Raises `ConfigError`."""
    tree = {} if path is None else read_yaml(path)
    sources: dict[str, str] = {}
    for override in overrides:
        _put(tree, override)
        sources[override.path] = override.source
    try:
        config = build(ClusterConfig, tree, Place("", sources))
    except ConfigError as error:
        raise ConfigError(str(error) if path is None else f"{path}: {error}") from None
    config.check()
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The file as a tree of mappings; an empty file is an empty tree. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {_kind(tree)}")
    return tree


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """YAML 1.1 takes on, off, yes and no for booleans too, which would make `checksum: off` no text."""
    boolean = "tag:yaml.org,2002:bool"
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "tTfF":
        kept[first] = [*kept.get(first, []), (boolean, re.compile("(?:true|True|TRUE|false|False|FALSE)$"))]
    return kept


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's own rules, which SafeLoader does not keep: a key appears once, only true and false are booleans."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _put(tree: dict[str, Any], override: Override) -> None:
    *parents, leaf = override.path.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            return  # the file is wrong here; building the tree says so
        tree = child
    tree[leaf] = override.value


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the tree a value stands; prints as the flag it came from, else as its dotted path."""

    path: str
    sources: Mapping[str, str]

    def child(self, key: object) -> Place:
        return Place(f"{self.path}.{key}" if self.path else str(key), self.sources)

    def __str__(self) -> str:
        return self.sources.get(self.path, self.path)

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self}: {message}" if str(self) else message)


def build(kind: type[T], tree: object, place: Place) -> T:
    """A settings dataclass from a mapping; unknown keys are refused."""
    if tree is None:
        return kind()
    if not isinstance(tree, Mapping):
        raise place.error(f"expected a mapping of settings, got {_kind(tree)}")
    hints = get_type_hints(kind, include_extras=True)
    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in tree:
        if key not in names:
            raise place.child(key).error(_unknown(str(key), names))
    return kind(**{key: _value(hints[key], value, place.child(key)) for key, value in tree.items()})


def _unknown(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.5)
    if near:
        return f"unknown setting; did you mean '{near[0]}'?"
    return f"unknown setting; known here are {', '.join(names)}"


def _value(hint: Any, value: object, place: Place) -> object:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner, *_ = (arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _value(inner, value, place)
    if origin is Annotated:
        base, rule = get_args(hint)
        return _ruled(base, rule, value, place)
    if origin is tuple:
        return _strings(value, place)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, place)
    return _plain(hint, value, place)


def _ruled(base: Any, rule: object, value: object, place: Place) -> object:
    if isinstance(rule, ByteSize):
        return _byte_size(rule, value, place)
    if isinstance(rule, NumberOr):
        return _number_or(rule, value, place)
    result = _plain(base, value, place)
    if isinstance(rule, OneOf) and result not in rule.values:
        near = difflib.get_close_matches(str(result), rule.values, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise place.error(f"must be one of {', '.join(rule.values)}, got '{result}'{hint}")
    if isinstance(rule, Range) and isinstance(result, int | float) and not rule.low <= result <= rule.high:
        bounds = f"at least {rule.low:g}" if rule.high == float("inf") else f"from {rule.low:g} to {rule.high:.10g}"
        raise place.error(f"must be {bounds}, got {result}")
    return result


def _number_or(rule: NumberOr, value: object, place: Place) -> object:
    if value == rule.word:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.error(f"expected a whole number or '{rule.word}', got {_kind(value)}")
    return _ruled(int, Range(rule.low, rule.high), value, place)


def _plain(kind: type, value: object, place: Place) -> object:
    """A bool, int, float, str or Path; a bool is no number and a number is no string."""
    if kind is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    if kind is Path and isinstance(value, Path):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    raise place.error(f"expected {expected}, got {_kind(value)}")


def _strings(value: object, place: Place) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise place.error(f"expected a list of texts, got {_kind(value)}")
    return tuple(str(_plain(str, item, place.child(index))) for index, item in enumerate(value))


def _byte_size(rule: ByteSize, value: object, place: Place) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise place.error(f"expected a size such as 2GiB, got {_kind(value)}")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise place.error(f"expected a size such as 512MiB or 2GiB, got '{value}'")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < rule.low:
        raise place.error(f"must be at least {rule.low} bytes, got {size}")
    return size


def _kind(value: object) -> str:
    """How a value reads in an error message."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or (f"'{value}'" if isinstance(value, str) else str(value))
