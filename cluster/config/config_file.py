"""Reads a `ClusterConfig` from YAML and command-line flags, strictly.

A misspelt key is an error that names the nearest right one; a wrong type or a value out of range is an error that names
the path and what was expected; a key given twice is an error. Flags override the file and obey the same rules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.settings import ConfigError, Field, Rule, fields_of, operator_fields, parts_of, shown

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in list(_UNITS.items()) if unit not in ("", "b")}
_UNITS |= {f"{unit}i{b}": 1 << (10 * power) for power, unit in enumerate("kmgt", 1) for b in ("", "b")}
_TEXT = Rule(str)


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
        config = build(tree, sources)
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
        raise ConfigError(f"{path}: expected a mapping at the top, got {shown(tree)}")
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


def build(tree: Mapping[str, object], sources: Mapping[str, str] | None = None) -> ClusterConfig:
    """A configuration from sections of settings; what is not named has its default.

    `sources` says which path came from which flag, for error messages. Raises `ConfigError`.
    """
    sections: dict[str, dict[str, Field]] = {}
    for setting, field in operator_fields(ClusterConfig):
        section, _, key = setting.path.partition(".")
        sections.setdefault(section, {})[key] = field
    values: dict[str, object] = {}
    for section, body in tree.items():
        if section not in sections:
            raise ConfigError(f"{section}: {_unknown(str(section), sections)}")
        if not isinstance(body, Mapping | None):
            raise ConfigError(f"{section}: expected a mapping of settings, got {shown(body)}")
        for key, value in (body or {}).items():
            path = f"{section}.{key}"
            if key not in sections[section]:
                raise ConfigError(f"{path}: {_unknown(str(key), sections[section])}")
            values[path] = _value(sections[section][key].rule, value, (sources or {}).get(path, path))
    return ClusterConfig(**_arguments(ClusterConfig, values))


def _arguments(kind: type, values: Mapping[str, object]) -> dict[str, Any]:
    """What a settings class is built from, its parts built already."""
    settings = [(field.name, field.setting.path) for field in fields_of(kind) if field.setting]
    given = {name: values[path] for name, path in settings if path in values}
    return given | {name: part(**_arguments(part, values)) for name, part in parts_of(kind)}


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    if near:
        return f"unknown setting; did you mean '{near[0]}'?"
    return f"unknown setting; known here are {', '.join(known)}"


def _value(rule: Rule, value: object, place: str) -> object:
    """A value of the file as the field wants it. `place` names it in errors."""
    if rule.is_size and not (value is None and rule.optional):
        value = _byte_size(value, place)
    elif rule.kind is Path and isinstance(value, str) and value:
        value = Path(value).expanduser()
    elif rule.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif rule.kind is tuple and isinstance(value, list | tuple):
        value = tuple(_value(_TEXT, item, f"{place}.{index}") for index, item in enumerate(value))
    refusal = rule.refusal(value)
    if refusal is not None:
        raise ConfigError(f"{place}: {refusal}")
    return value


def _byte_size(value: object, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{place}: expected a size such as 2GiB, got {shown(value)}")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{place}: expected a size such as 512MiB or 2GiB, got '{value}'")
    return int(float(match[1]) * _UNITS[match[2].lower()])
