"""Every setting at once: random files that are right build what they say, and each value out of range is refused."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.cluster.config.cluster_config import SECTIONS, ClusterConfig
from kvbaton.cluster.config.config_file import build
from kvbaton.settings import ConfigError, Field, Rule, Setting, fields_of, operator_fields

SETTINGS = list(operator_fields(ClusterConfig))
LARGEST = 1 << 40  # of what has no upper bound


def allowed(rule: Rule) -> st.SearchStrategy[object]:
    """Values of the field itself."""
    values: dict[type, st.SearchStrategy[object]] = {
        bool: st.booleans(),
        str: st.nothing() if rule.words else st.text(max_size=5),
        Path: st.just(Path("/some/folder")),
        tuple: st.lists(st.text(max_size=5), max_size=3).map(tuple),
    }
    if rule.kind is int:
        values[int] = st.integers(int(rule.low), int(min(rule.high, LARGEST)))
    if rule.kind is float:
        values[float] = st.floats(rule.low, rule.high)
    unset = st.none() if rule.optional else st.nothing()
    words = st.sampled_from(rule.words) if rule.words else st.nothing()
    return values[rule.kind] | words | unset


def section_and_key(setting: Setting) -> tuple[str, str]:
    section, _, key = setting.path.partition(".")
    return section, key


@st.composite
def trees(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    """Some settings, as they come out of a file."""
    tree: dict[str, dict[str, object]] = {}
    for setting, field in draw(st.lists(st.sampled_from(SETTINGS), unique_by=lambda pair: pair[0].path)):
        section, key = section_and_key(setting)
        value = draw(allowed(field.rule))
        tree.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return tree


def parts(config: object) -> list[object]:
    """A configuration and all that it is composed of."""
    inner = [getattr(config, item.name) for item in fields(config) if is_dataclass(getattr(config, item.name))]
    return [config, *(part for one in inner for part in parts(one))]


@given(trees())
def test_a_file_that_is_right_builds_what_it_says(tree: dict[str, dict[str, object]]) -> None:
    """Guards the way of each setting to the class that uses it; what is not named keeps its default."""
    built = {
        field.label: getattr(part, field.name)
        for part in parts(build(tree))
        for field in fields_of(type(part))
        if field.setting is not None
    }
    for setting, field in SETTINGS:
        section, key = section_and_key(setting)
        wanted = tree.get(section, {}).get(key, field.default)
        assert built[setting.path] == (Path(wanted) if field.rule.kind is Path else wanted)


def wrong(rule: Rule) -> list[object]:
    """Values just outside."""
    step = 1 if rule.kind is int else 1e-6
    found: list[object] = [{}, "no such word" if rule.words else 3 if rule.kind in (str, Path, tuple) else "x"]
    found += [rule.low - step] if rule.low > -inf else []
    found += [rule.high + step] if rule.high < inf else []
    return found + ([] if rule.optional else [None])


@pytest.mark.parametrize(("setting", "field"), SETTINGS, ids=[setting.path for setting, _ in SETTINGS])
def test_values_out_of_range_are_refused_with_their_path(setting: Setting, field: Field) -> None:
    """Guards against a setting without a check, which would fail somewhere inside an engine."""
    section, key = section_and_key(setting)
    for value in wrong(field.rule):
        with pytest.raises(ConfigError) as refused:
            build({section: {key: value}})
        assert str(refused.value).startswith(f"{setting.path}: ")


def test_every_setting_has_a_place_of_its_own_and_a_meaning() -> None:
    """Guards the file: two fields under one path, or a section that `kvbaton config` does not print."""
    paths = [setting.path for setting, _ in SETTINGS]
    assert sorted(set(paths)) == sorted(paths)
    assert {section_and_key(setting)[0] for setting, _ in SETTINGS} == set(SECTIONS)
    for setting, field in SETTINGS:
        assert setting.meaning
        assert (setting.unset is not None) == (field.default is None), f"{setting.path}: say what None comes to"
        assert field.rule.refusal(field.default) is None
