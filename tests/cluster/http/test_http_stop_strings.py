"""Stop strings: found wherever the text is cut, nothing shown that belongs to one, nothing held back without need."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvbaton.cluster.http.generation import ChoiceText, TextRules
from kvbaton.cluster.http.stop_strings import Scan, StopMatcher
from kvbaton.engine.request import TokenOutput
from kvbaton.engine.text.tokenizer import Tokenizer

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


@given(_TEXT, _TEXT, _STOPS)
def test_a_match_can_be_foreseen(before: str, after: str, stops: list[str]) -> None:
    matcher, other = StopMatcher(stops), StopMatcher(stops)
    if matcher.push(before).stop is None:
        other.push(before)
        foreseen = matcher.would_match(after)
        scan = other.push(after)
        assert foreseen == (scan.stop is not None)
        assert matcher.push(after) == scan


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


def byte_fallback() -> Tokenizer:
    """Only "a" and "b" are pieces; all else, line breaks too, are byte tokens. Ids: byte + 1, then 257 and 258."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    rust = RustTokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust))


def say(text: str, rules: TextRules) -> tuple[str, int, bool]:
    """The text shown, the tokens taken, and whether a stop string ended it."""
    ids = [ord(char) - ord("a") + 257 if char in "ab" else [1 + byte for byte in char.encode()] for char in text]
    choice = ChoiceText(0, byte_fallback().detokenizer(), rules)
    shown = ""
    for index, token in enumerate(itertools.chain.from_iterable([one] if isinstance(one, int) else one for one in ids)):
        shown += choice.feed(TokenOutput("r", 0, 0, index, token)).text
        if choice.done:
            break
    return shown, choice.tokens, choice.cut


@pytest.mark.parametrize(
    ("stop", "shown", "tokens"), [("😀", "a", 5), ("é\n", "a😀", 8), ("\n", "a😀é", 8), ("b", "a😀é\n", 9)]
)
@pytest.mark.parametrize("include", [False, True])
def test_characters_of_several_byte_tokens(stop: str, shown: str, tokens: int, include: bool) -> None:
    """Guards vocabularies with byte fallback: found with the last byte, not a token later."""
    assert say("a😀é\nb", TextRules((stop,), include)) == (shown + stop * include, tokens, True)


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, "a"), (1, "a"), (2, "a\nb"), (3, "a\nb")])
def test_min_tokens_with_a_byte_token(min_tokens: int, shown: str) -> None:
    """The first line break is the second token: while that does not count it ends nothing, not even a token later."""
    assert say("a\nb\n", TextRules(("\n",), min_tokens=min_tokens))[0] == shown
