"""Stop strings: found wherever the text is cut, nothing shown that belongs to one, nothing held back without need."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.cluster.http.stop_strings import Scan, StopMatcher

_TEXT = st.text(alphabet="abé", max_size=24)
_STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


def naive(text: str, stops: list[str], include: bool, armed_from: int = 0) -> tuple[str, str | None]:
    """The match that ends first, and of those the longest, found by looking at every end."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@given(_TEXT, _STOPS, st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_equal_to_the_naive_search_whatever_the_pieces(
    text: str, stops: list[str], places: list[int], include: bool
) -> None:
    """Guards against matches missed or made at the border of two tokens."""
    matcher = StopMatcher(stops, include)
    shown, found, rest = "", None, ""
    for piece in cut(text, places):
        if found is not None:
            rest += piece
            continue
        scan = matcher.push(piece)
        shown, found, rest = shown + scan.text, scan.stop, scan.rest
    if found is None:
        shown += matcher.flush()
    assert (shown, found) == naive(text, stops, include)
    if found is not None:
        assert shown + ("" if include else found) + rest == text


@given(_TEXT, _STOPS)
def test_holds_back_exactly_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    """Guards against late text (too much held) and against showing the start of a stop string (too little)."""
    matcher = StopMatcher(stops)
    shown = ""
    for position, char in enumerate(text):
        scan = matcher.push(char)
        if scan.stop is not None:
            return
        shown += scan.text
        so_far = text[: position + 1]
        longest = max(
            length for stop in stops for length in range(len(stop)) if so_far.endswith(stop[:length]) or length == 0
        )
        assert shown == so_far[: len(so_far) - longest]


@given(_TEXT, _TEXT, _STOPS)
def test_unarmed_text_ends_nothing_but_may_begin_a_match(before: str, after: str, stops: list[str]) -> None:
    """min_tokens: a match that ends in the first tokens does not count, one that only begins there does."""
    matcher = StopMatcher(stops)
    first = matcher.push(before, armed=False)
    assert first.stop is None
    second = matcher.push(after)
    shown = first.text + second.text + ("" if second.stop else matcher.flush())
    assert (shown, second.stop) == naive(before + after, stops, include=False, armed_from=len(before))


def test_the_longest_of_those_that_end_together_is_removed() -> None:
    assert StopMatcher(["b", "ab"]).push("xab") == Scan("x", "ab", "")
    assert StopMatcher(["abcd", "bc"]).push("abcd") == Scan("a", "bc", "d")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_many_pieces(include: bool) -> None:
    matcher = StopMatcher(["\n\nUser:"], include)
    assert [matcher.push(piece) for piece in ("Hi\n", "\nUs", "e")] == [Scan("Hi"), Scan(""), Scan("")]
    assert matcher.push("r: what") == Scan("\n\nUser:" if include else "", "\n\nUser:", " what")
