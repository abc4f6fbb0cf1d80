"""The payload that travels with a hand-off's DONE: tokens, as little-endian int64.

A prompt brings the first token of each sample that goes on, as prefill drew it. A migrated sequence brings every token
that it has got since the target was told of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence


def encode_first_tokens(tokens: dict[int, int]) -> bytes:
    """`tokens` maps sample index to token id."""
    return array("q", [value for pair in tokens.items() for value in pair]).tobytes()


def decode_first_tokens(payload: bytes) -> dict[int, int]:
    """Inverse of `encode_first_tokens`; raises `ValueError` for a payload that it cannot have made."""
    if len(payload) % 16:
        raise ValueError(f"first tokens: {len(payload)} bytes is not a multiple of 16")
    values = array("q")
    values.frombytes(payload)
    return dict(zip(values[::2], values[1::2], strict=True))


def encode_newest_tokens(tokens: Sequence[int]) -> bytes:
    """The tokens of a migrated sequence, oldest first."""
    return array("q", tokens).tobytes()


def decode_newest_tokens(payload: bytes, vocab_size: int) -> list[int]:
    """Inverse of `encode_newest_tokens`; raises `ValueError` for a payload that it cannot have made."""
    if not payload or len(payload) % 8:
        raise ValueError(f"newest tokens: {len(payload)} bytes is no positive multiple of 8")
    tokens = array("q")
    tokens.frombytes(payload)
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(f"newest tokens: a token id is out of vocabulary (0 to {vocab_size - 1})")
    return list(tokens)
