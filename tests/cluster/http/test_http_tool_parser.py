"""Tool calls read from text, whole or in pieces."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.cluster.http.tools import CallArguments, CallStart, Content, ToolCallParser, ToolEvent

WEATHER = (
    '<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Bergen", "note": "a } or </tool_call> \\" inside"}}\n</tool_call>'
)
SWAPPED = '<tool_call>{"arguments": {"x": [1, {"y": 2}]}, "name": "calc"}</tool_call>'
TRICKY = '<tool_call>{"arguments": {"note": "</tool_call> } \\" <tool_call>"}, "name": "note"}</tool_call>'
AS_TEXT = '<tool_call>{"name": "say", "arguments": "{\\"word\\": \\"hi\\"}"}</tool_call>'


def parse(pieces: list[str], parallel: bool = True) -> tuple[str, list[tuple[str, str, str]]]:
    """Content, and each call as (id, name, arguments)."""
    ids = (f"id{number}" for number in itertools.count())
    parser = ToolCallParser(lambda: next(ids), parallel)
    events: list[ToolEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    content = "".join(event.text for event in events if isinstance(event, Content))
    starts = [event for event in events if isinstance(event, CallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    texts = [
        "".join(event.text for event in events if isinstance(event, CallArguments) and event.index == start.index)
        for start in starts
    ]
    return content, [(start.id, start.name, text) for start, text in zip(starts, texts, strict=True)]


def test_arguments_are_the_models_own_text_with_tags_and_braces_in_strings() -> None:
    content, calls = parse([WEATHER])
    assert content == ""
    assert calls == [("call_id0", "weather", WEATHER[WEATHER.index('{"city') : WEATHER.rindex("}\n<")])]
    assert json.loads(calls[0][2]) == {"city": "Bergen", "note": 'a } or </tool_call> " inside'}


def test_order_of_keys_and_arguments_as_text() -> None:
    content, calls = parse([f"One moment.\n{SWAPPED}\n{AS_TEXT}"])
    assert content == "One moment."
    assert [(name, json.loads(text)) for _, name, text in calls] == [
        ("calc", {"x": [1, {"y": 2}]}),
        ("say", {"word": "hi"}),
    ]


def in_pieces(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


FRAGMENTS = [
    *(WEATHER, SWAPPED, TRICKY, AS_TEXT, "text ", "\n", " ", "<tool", "</tool_call>", "<tool_call>", "<"),
    *("<tool_call>nonsense</tool_call>", '{"name": "f", "arguments": {', ', "id": 1}', "{", "}", ",", '"', "\\", "]"),
    *('{"name": "g", "arguments": {"x": 1}}', '<tool_call>{"name": "h", "arguments": {"a": "', '"name": "k"'),
    *('{"arguments": {"b": [', "NaN", "1e999"),
]
PLACES = st.lists(st.integers(0, 600), max_size=12)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9), PLACES, st.integers(0, 900))
@settings(max_examples=600, deadline=None)
def test_the_pieces_do_not_matter(parts: list[str], places: list[int], length: int) -> None:
    """Guards the streamed answer against differing from the whole one, cut off by its length or not."""
    text = "".join(parts)[:length]
    whole = parse([text])
    assert parse(in_pieces(text, places)) == whole
    assert parse(list(text)) == whole


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9))
@settings(max_examples=600, deadline=None)
def test_nothing_vanishes(parts: list[str]) -> None:
    """Words between the fragments: each is content, or in the arguments of a call, once."""
    words = [f"w{number:02}" for number in range(len(parts) + 1)]
    text = words[0] + "".join(part + word for part, word in zip(parts, words[1:], strict=True))
    content, calls = parse([text])
    found = content + "".join(name + arguments for _, name, arguments in calls)
    assert sorted(re.findall(r"w\d\d", found)) == words


CALLS = st.dictionaries(
    st.sampled_from(["a", "b"]),
    st.sampled_from(["</tool_call>", '"}{', "é\n", "\\"]) | st.integers() | st.lists(st.integers()) | st.booleans(),
).map(json.dumps)
PLAIN = st.sampled_from(["", "Well. ", "a < b {x}", "</tool> [1]", "and\nso on"])


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, str]]]:
    """A text, its content without white space, and its calls, written in each of the ways that models have."""
    text = content = draw(PLAIN)
    calls: list[tuple[str, str]] = []
    closing = ""
    for number in range(draw(st.integers(0, 4))):
        arguments, name = draw(CALLS), f"f{number}"
        forms = [f'{{"name": "{name}", "arguments": {arguments}}}', f'{{"arguments": {arguments}, "name": "{name}"}}']
        opening = draw(st.sampled_from(["<tool_call>", "\n<tool_call>\n"]))
        if calls and not closing and draw(st.booleans()):
            opening = draw(st.sampled_from(["\n", ",", ""]))
        closing = draw(st.sampled_from(["</tool_call>", "\n</tool_call>", ""]))
        more = draw(PLAIN) if closing else ""
        text += opening + draw(st.sampled_from(forms)) + closing + more
        content += more
        calls.append((name, arguments))
    return text, "".join(content.split()), calls


@given(conversations(), PLACES)
@settings(max_examples=400, deadline=None)
def test_each_call_and_all_of_the_text(expected: tuple[str, str, list[tuple[str, str]]], places: list[int]) -> None:
    """Text before, between and behind; two calls in one tag; closing tags inside strings, or none at all."""
    text, content, calls = expected
    found, read = parse(in_pieces(text, places))
    assert "".join(found.split()) == content
    assert [(name, arguments) for _, name, arguments in read] == calls


@pytest.mark.parametrize("raw", ["123456789012345678901234567890", "NaN", "-Infinity", "1e999", "1.10", "9" * 5000])
@pytest.mark.parametrize("form", ['{"name": "f", "arguments": {"x": %s}}', '{"arguments": {"x": %s}, "name": "f"}'])
def test_numbers_keep_their_digits(raw: str, form: str) -> None:
    content, calls = parse([f"<tool_call>{form % raw}</tool_call>"])
    assert (content, [text for _, _, text in calls]) == ("", [f'{{"x": {raw}}}'])


@pytest.mark.parametrize("arguments", ["{}", '""', "null", '"{}"'])
def test_empty_arguments_are_an_object(arguments: str) -> None:
    assert parse([f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>']) == (
        "",
        [("call_id0", "f", "{}")],
    )
    assert parse(['<tool_call>{"name": "f"}</tool_call>']) == ("", [("call_id0", "f", "{}")])


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> then', " then", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {"a": [1</tool_call> then', " then", '{"a": [1'),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}} then', " then", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool', "", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', "", '{"a": "b'),
        ('<tool_call>{"name": "f", "arguments": {}, and so}</tool_call>', ", and so}</tool_call>", "{}"),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 3}</tool_call>', "", "{}"),
    ],
)
def test_damaged_calls(text: str, content: str, arguments: str) -> None:
    """A brace or a tag is missing, or the length ends the text: the call stays one, what is behind it is text."""
    assert parse([text]) == (content, [("call_id0", "f", arguments)])


def test_a_broken_call_hides_none_behind_it() -> None:
    content, calls = parse(['<tool_call>{"arguments": {"a": 1\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'])
    assert content == '<tool_call>{"arguments": {"a": 1'
    assert [name for _, name, _ in calls] == ["f"]


@pytest.mark.parametrize(
    "unit", ['<tool_call>{"', '<tool_call>{"\\"', "<tool_call>{", '<tool_call>{"a":"', "<tool_call>"]
)
def test_broken_calls_are_read_a_few_times_only(unit: str) -> None:
    """Guards the ingress's loop: 100,000 characters of broken calls take well under a second, not minutes."""
    text = unit * (100_000 // len(unit))
    assert parse([text]) == (text, [])


def test_arguments_are_streamed_while_they_are_written() -> None:
    parser = ToolCallParser(lambda: "x")
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"a": ') == [CallStart(0, "call_x", "f"), CallArguments(0, '{"a": ')]
    assert parser.push('"b') == [CallArguments(0, '"b')]
    assert parser.push('"}}</tool') == [CallArguments(0, '"}')]
    assert parser.push("_call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "argu',
        "a < b and <tool",
        " \n ",
    ],
)
def test_what_is_no_call_is_shown_as_it_is(text: str) -> None:
    """Guards against text that vanishes because it looked like a call."""
    assert parse([text]) == (text, [])
    assert parse(list(text)) == (text, [])


def test_a_call_without_its_closing_tag_counts_when_it_is_complete() -> None:
    assert parse(['<tool_call>{"arguments": {}, "name": "f"}']) == ("", [("call_id0", "f", "{}")])


def test_only_the_first_call_where_clients_forbid_parallel_ones() -> None:
    _, calls = parse([WEATHER + SWAPPED], parallel=False)
    assert [name for _, name, _ in calls] == ["weather"]
