"""Tool calls in the text of a model that writes them as `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

    CONTENT --<tool_call>--> HEADER --name, "arguments":--> ARGUMENTS --object closed--> TAIL --</tool_call>--> CONTENT
                             HEADER --</tool_call>, JSON read whole--> CONTENT

Arguments are passed on as the model writes them, piece by piece, when the name comes first; else once complete.
Text that turns out not to be a call is shown as it is.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from kvbaton.cluster.http.stop_strings import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


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
    TAIL = "tail"


class ToolCallParser:
    """Follows the text of one choice. `parallel` False: calls after the first are dropped."""

    def __init__(self, new_id: Callable[[], str], parallel: bool = True) -> None:
        self.calls = 0
        self._new_id = new_id
        self._parallel = parallel
        self._state = _State.CONTENT
        self._opening = StopMatcher((OPEN,))
        self._closing = StopMatcher((CLOSE,))
        self._buffer = ""
        self._blank = ""  # white space that is content only if text follows
        self._value = ObjectScanner()

    def push(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        while text:
            text = self._step(text, events)
        return self._kept(events)

    def finish(self) -> list[ToolEvent]:
        """The end of the text. A call without its closing tag counts if its JSON is complete."""
        events: list[ToolEvent] = []
        if self._state is _State.CONTENT:
            self._show(self._opening.flush(), events)
        elif self._state is _State.HEADER:
            self._whole_call(self._buffer, OPEN + self._buffer, events)
        if self._blank and not self.calls:
            events.append(Content(self._blank))
        self._blank = ""
        return self._kept(events)

    def _step(self, text: str, events: list[ToolEvent]) -> str:
        """Handle the start of `text` in the present state; returns what is left of it."""
        match self._state:
            case _State.CONTENT:
                return self._content(text, events)
            case _State.HEADER:
                return self._header(text, events)
            case _State.ARGUMENTS:
                return self._arguments(text, events)
            case _State.TAIL:
                return self._tail(text)

    def _content(self, text: str, events: list[ToolEvent]) -> str:
        scan = self._opening.push(text)
        self._show(scan.text, events)
        if scan.stop is not None:
            self._state, self._buffer = _State.HEADER, ""
        return scan.rest

    def _show(self, text: str, events: list[ToolEvent]) -> None:
        whole = self._blank + text
        shown = whole.rstrip()
        self._blank = whole[len(shown) :]
        if shown:
            events.append(Content(shown))

    def _header(self, text: str, events: list[ToolEvent]) -> str:
        self._buffer += text
        header = _HEADER.match(self._buffer)
        if header is not None:
            rest = self._buffer[header.end() :]
            self._start(header[1], events)
            self._state, self._value = _State.ARGUMENTS, ObjectScanner()
            return rest
        end = self._buffer.find(CLOSE)
        if end < 0:
            return ""
        body, rest = self._buffer[:end], self._buffer[end + len(CLOSE) :]
        self._whole_call(body, OPEN + body + CLOSE, events)
        self._state = _State.CONTENT
        return rest

    def _arguments(self, text: str, events: list[ToolEvent]) -> str:
        used = self._value.scan(text)
        events.append(CallArguments(self.calls - 1, text[:used]))
        if self._value.closed:
            self._state = _State.TAIL
        return text[used:]

    def _tail(self, text: str) -> str:
        scan = self._closing.push(text)
        if scan.stop is None:
            return ""
        self._state = _State.CONTENT
        return scan.rest

    def _whole_call(self, body: str, shown: str, events: list[ToolEvent]) -> None:
        call = _read_call(body)
        if call is None:
            self._show(shown, events)
            return
        self._start(call.name, events)
        events.append(CallArguments(self.calls - 1, call.arguments))

    def _start(self, name: str, events: list[ToolEvent]) -> None:
        events.append(CallStart(self.calls, f"call_{self._new_id()[:24]}", name))
        self.calls += 1
        self._blank = ""

    def _kept(self, events: list[ToolEvent]) -> list[ToolEvent]:
        if self._parallel:
            return events
        return [event for event in events if isinstance(event, Content) or event.index == 0]


class ObjectScanner:
    """Finds where a JSON object that starts with the first character scanned is closed."""

    __slots__ = ("_depth", "_escaped", "_quoted", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
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
    """A call read whole, or None where `body` is not one."""
    try:
        call = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return _Call(call["name"], arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode())
