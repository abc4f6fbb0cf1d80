"""Stop strings found in text that arrives in pieces, whatever the pieces are.

Each stop string is followed by its own Knuth-Morris-Pratt automaton, so the cost is linear in the text and the answer
does not depend on where the pieces were cut: the match that ends first wins, and of those that end together the
longest. Text that may be the beginning of a stop string is held back until it is known not to be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Scan(NamedTuple):
    """`text` may be shown. After a match `stop` is the string found and `rest` is what followed it."""

    text: str
    stop: str | None = None
    rest: str = ""


@dataclass(slots=True)
class _Automaton:
    """How many characters of `pattern` the text so far ends with."""

    pattern: str
    failure: tuple[int, ...]
    state: int = 0

    def step(self, char: str) -> bool:
        """Advance by one character; True when the pattern ends here."""
        state = self.state
        if state == len(self.pattern):
            state = self.failure[state - 1]
        while state and self.pattern[state] != char:
            state = self.failure[state - 1]
        if self.pattern[state] == char:
            state += 1
        self.state = state
        return state == len(self.pattern)

    def held(self) -> int:
        """Length of the end of the text that may still grow into the pattern."""
        return self.failure[-1] if self.state == len(self.pattern) else self.state


class StopMatcher:
    """Holds back what may become a stop string. One matcher follows one text; patterns must not be empty."""

    __slots__ = ("_automata", "_held", "_include", "_starts")

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._automata = [_Automaton(stop, failure_table(stop)) for stop in stops]
        self._starts = frozenset(stop[0] for stop in stops)
        self._include = include_stop
        self._held = ""

    def push(self, text: str, armed: bool = True) -> Scan:
        """Text that may be shown now. While not `armed`, a match that ends in `text` does not count."""
        if not self._held and self._starts.isdisjoint(text):
            return Scan(text)  # every automaton is at its start and stays there
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            stop = self._step(buffer[position])
            if stop is not None and armed:
                return self._matched(buffer, position + 1, stop)
        keep = max(automaton.held() for automaton in self._automata)
        self._held = buffer[len(buffer) - keep :]
        return Scan(buffer[: len(buffer) - keep])

    def would_match(self, text: str) -> bool:
        """Whether `push` would find a stop string in `text`."""
        states = [automaton.state for automaton in self._automata]
        found = any(self._step(char) is not None for char in text)
        for automaton, state in zip(self._automata, states, strict=True):
            automaton.state = state
        return found

    def flush(self) -> str:
        """The text held back, once nothing more will come."""
        held, self._held = self._held, ""
        for automaton in self._automata:
            automaton.state = 0
        return held

    def _step(self, char: str) -> str | None:
        longest: str | None = None
        for automaton in self._automata:
            if automaton.step(char) and (longest is None or len(automaton.pattern) > len(longest)):
                longest = automaton.pattern
        return longest

    def _matched(self, buffer: str, end: int, stop: str) -> Scan:
        self.flush()
        shown = end if self._include else end - len(stop)
        return Scan(buffer[:shown], stop, buffer[end:])


def failure_table(pattern: str) -> tuple[int, ...]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return tuple(table)
