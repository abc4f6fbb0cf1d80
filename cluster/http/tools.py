"""Tool calls in the text of a model that writes them as `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

    CONTENT --<tool_call>--> HEADER --name, "arguments": {--> ARGUMENTS --object closed--> REST --}--> TAIL
                             HEADER --object read whole, a call--> TAIL
                             TAIL --</tool_call>--> CONTENT     TAIL --{ or <tool_call>--> HEADER

Arguments are passed on as the model writes them, piece by piece when the name comes first, else once complete. What
turns out not to be a call is text, tags included, and is read again from behind its opening tag. So no character
vanishes but the tags of calls and the white space around them, and where the text was cut makes no difference.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecoder

from kvbaton.cluster.http.stop_strings import StopMatcher

OPEN, CLOSE = TAGS = "<tool_call>", "</tool_call>"
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_KEY = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*', re.DOTALL)
# Numbers stay text: they are checked, never converted. Models write line breaks into strings.
_JSON = JSONDecoder(parse_int=str, parse_float=str, parse_constant=str, strict=False)


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str


ToolEvent = Content | CallStart | CallArguments


class _State(enum.Enum):
    CONTENT = "content"
    HEADER = "header"
    ARGUMENTS = "arguments"
    REST = "rest"
    TAIL = "tail"


class ToolCallParser:
    """Follows the text of one choice. `parallel` False: calls after the first are dropped."""

    def __init__(self, new_id: Callable[[], str], parallel: bool = True) -> None:
        self.calls = 0
        self._new_id = new_id
        self._parallel = parallel
        self._state = _State.CONTENT
        self._opening = StopMatcher((OPEN,))
        self._before = ""  # what led to the present HEADER, text if no call follows
        self._buffer = ""
        self._blank = ""  # white space that is content only if text follows
        self._behind_call = False
        self._value = ObjectScanner()

    def push(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        while text:
            text = self._step(text, events)
        return self._kept(events)

    def finish(self) -> list[ToolEvent]:
        """The end of the text. A call without its closing tag counts if its JSON is complete."""
        events: list[ToolEvent] = []
        text = ""
        while self._state is not _State.CONTENT or text:
            text = self._step(text, events) if text else self._end(events)
        self._show(self._opening.flush(), events)
        if self._blank and not self._behind_call:
            events.append(Content(self._blank))
        self._blank = ""
        return self._kept(events)

    def _end(self, events: list[ToolEvent]) -> str:
        """The end in the midst of something: it stays open no longer. Returns what is text after all."""
        buffer, state = self._buffer, self._state
        if state is _State.HEADER:
            return self._no_call(events)
        self._state, self._buffer = _State.CONTENT, ""
        cut_tag = state is _State.TAIL and buffer.strip().startswith("</")
        return "" if cut_tag or not buffer.strip() else buffer

    def _step(self, text: str, events: list[ToolEvent]) -> str:
        """Handle the start of `text` in the present state; returns what is left of it."""
        match self._state:
            case _State.CONTENT:
                return self._content(text, events)
            case _State.HEADER:
                return self._header(text, events)
            case _State.ARGUMENTS:
                return self._arguments(text, events)
            case _State.REST:
                return self._rest(text)
            case _State.TAIL:
                return self._tail(text)

    def _content(self, text: str, events: list[ToolEvent]) -> str:
        scan = self._opening.push(text)
        self._show(scan.text, events)
        if scan.stop is not None:
            self._expect_call(OPEN)
        return scan.rest

    def _show(self, text: str, events: list[ToolEvent]) -> None:
        whole = self._blank + text
        shown = whole.rstrip()
        self._blank = whole[len(shown) :]
        if shown:
            self._behind_call = False
            events.append(Content(shown))

    def _expect_call(self, before: str) -> None:
        self._state, self._before, self._buffer, self._value = _State.HEADER, before, "", ObjectScanner()

    def _header(self, text: str, events: list[ToolEvent]) -> str:
        blank = not self._buffer.strip()
        start = len(text) - len(text.lstrip()) if blank else 0
        if blank and start == len(text):
            self._buffer += text
            return ""
        if blank and text[start] != "{":
            return self._no_call(events) + text
        used = start + self._value.scan(text[start:])
        self._buffer += text[:used]
        header = _HEADER.match(self._buffer)
        if header is not None:
            return self._open_call(header, text[used:], events)
        if self._value.closed:
            call = _read_call(self._buffer)
            if call is not None:
                self._start(call.name, events)
                events.append(CallArguments(self.calls - 1, call.arguments))
                self._state, self._buffer = _State.TAIL, ""
                return text[used:]
        if self._value.closed or self._value.broken:
            return self._no_call(events) + text[used:]
        return ""

    def _no_call(self, events: list[ToolEvent]) -> str:
        """What led here is text; returns what came since, to be read again."""
        rest, self._state, self._buffer = self._buffer, _State.CONTENT, ""
        self._show(self._before, events)
        return rest

    def _open_call(self, header: re.Match[str], rest: str, events: list[ToolEvent]) -> str:
        arguments = self._buffer[header.end() :]
        self._start(header[1], events)
        self._state, self._buffer, self._value = _State.ARGUMENTS, "", ObjectScanner()
        return arguments + rest

    def _arguments(self, text: str, events: list[ToolEvent]) -> str:
        used = self._value.scan(text)
        if used:
            events.append(CallArguments(self.calls - 1, text[:used]))
        if self._value.closed or self._value.broken:
            self._state, self._value = _State.REST, ObjectScanner(depth=1)
        return text[used:]

    def _rest(self, text: str) -> str:
        """From the arguments to the end of the call's object: a brace, or more members, which nobody wants."""
        used = self._value.scan(text)
        rest, self._buffer = self._buffer + text[:used], ""
        left, first = text[used:], rest.lstrip()[:1]
        if self._value.closed and _is_json('{"":0' + rest):
            self._state = _State.TAIL
            return left
        if not self._value.closed and not self._value.broken and first in ("", ","):
            self._buffer = rest
            return left
        self._state = _State.TAIL  # the brace is missing
        return rest + left

    def _tail(self, text: str) -> str:
        """Behind a call: its closing tag, another call, or text."""
        buffer, self._buffer = self._buffer + text, ""
        found = buffer.lstrip()
        blank = buffer[: len(buffer) - len(found)]
        another = re.match(r",?\s*(?=\{)", found)
        if another is not None:
            self._expect_call(blank + another[0])
            return found[another.end() :]
        if found.startswith(CLOSE):
            self._state = _State.CONTENT
            return found[len(CLOSE) :]
        if CLOSE.startswith(found) or re.fullmatch(r",\s*", found):
            self._buffer = buffer
            return ""
        self._state = _State.CONTENT
        return buffer

    def _start(self, name: str, events: list[ToolEvent]) -> None:
        events.append(CallStart(self.calls, f"call_{self._new_id()[:24]}", name))
        self.calls += 1
        self._blank = ""
        self._behind_call = True

    def _kept(self, events: list[ToolEvent]) -> list[ToolEvent]:
        if self._parallel:
            return events
        return [event for event in events if isinstance(event, Content) or event.index == 0]


class ObjectScanner:
    """Finds where a JSON object is closed, `depth` levels of which are open already.

    `broken`: what comes next is a character that JSON has in strings only, and that would hide a tag.
    """

    __slots__ = ("_depth", "_escaped", "_quoted", "broken", "closed")

    def __init__(self, depth: int = 0) -> None:
        self.closed = False
        self.broken = False
        self._depth = depth
        self._quoted = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for index, char in enumerate(text):
            if self._quoted:
                self._string_char(char)
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.closed = True
                    return index + 1
            elif char in "<\\":
                self.broken = True
                return index
        return len(text)

    def _string_char(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._quoted = False


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: str


def _read_call(body: str) -> _Call | None:
    """A call read whole, or None where `body` is not one. Arguments keep the model's own text."""
    if not _is_json(body):
        return None
    members = _members(body.strip())
    try:
        name = _JSON.decode(members.get("name", "null"))
        raw = members.get("arguments", members.get("parameters", "{}"))
        value = _JSON.decode(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not members["name"].startswith('"'):
        return None
    if raw.startswith('"'):
        raw = value  # some models write the arguments as text that is JSON
    return _Call(name, "{}" if raw in ("", "null") else raw)


def _members(body: str) -> dict[str, str]:
    """The members of a valid JSON object, each value as it is written."""
    members: dict[str, str] = {}
    place = 1
    while (key := _KEY.match(body, place)) is not None:
        _, end = _JSON.raw_decode(body, key.end())
        members[key[1]] = body[key.end() : end]
        place = body.find(",", end) + 1 or len(body)  # only white space lies between
    return members


def _is_json(text: str) -> bool:
    try:
        _JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
