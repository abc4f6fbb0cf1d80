"""Tokens that travel with DONE: what is written is read, and what cannot have been written is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.handoff_payload import (
    decode_first_tokens,
    decode_newest_tokens,
    encode_first_tokens,
    encode_newest_tokens,
)


@given(st.dictionaries(st.integers(0, 15), st.integers(0, 1 << 31), max_size=16))
def test_first_tokens_come_back(tokens: dict[int, int]) -> None:
    assert decode_first_tokens(encode_first_tokens(tokens)) == tokens


@given(st.lists(st.integers(0, 999), min_size=1, max_size=50))
def test_newest_tokens_come_back(tokens: list[int]) -> None:
    assert decode_newest_tokens(encode_newest_tokens(tokens), 1000) == tokens


@pytest.mark.parametrize("size", [1, 8, 17])
def test_first_tokens_are_whole_pairs(size: int) -> None:
    with pytest.raises(ValueError, match=f"first tokens: {size} bytes"):
        decode_first_tokens(b"\0" * size)


@pytest.mark.parametrize("size", [0, 1, 12])
def test_newest_tokens_are_whole_and_some(size: int) -> None:
    with pytest.raises(ValueError, match=f"newest tokens: {size} bytes"):
        decode_newest_tokens(b"\0" * size, 10)


@pytest.mark.parametrize("tokens", [[10], [0, -1]])
def test_newest_tokens_are_in_the_vocabulary(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"out of vocabulary \(0 to 9\)"):
        decode_newest_tokens(encode_newest_tokens(tokens), 10)
