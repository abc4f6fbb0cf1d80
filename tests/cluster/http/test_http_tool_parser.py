"""Tool calls read from text, whole or in pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.cluster.http.tools import CallArguments, CallStart, Content, ToolCallParser, ToolEvent

WEATHER = (
    '<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Bergen", "note": "a } or </tool_call> \\" inside"}}\n</tool_call>'
)
SWAPPED = '<tool_call>{"arguments": {"x": [1, {"y": 2}]}, "name": "calc"}</tool_call>'
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


@given(
    st.lists(
        st.sampled_from([WEATHER, SWAPPED, AS_TEXT, "text ", "\n", "<tool", "<tool_call>nonsense</tool_call>", "{"]),
        max_size=5,
    ),
    st.lists(st.integers(0, 600), max_size=12),
)
def test_the_pieces_do_not_matter(parts: list[str], places: list[int]) -> None:
    """Guards the streamed answer against differing from the whole one."""
    text = "".join(parts)
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = parse([text])
    assert parse(pieces) == whole
    assert parse(list(text)) == whole


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
