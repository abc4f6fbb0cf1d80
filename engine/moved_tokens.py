"""The payload of a move: every token that the sequence has got since the target was told of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


def encode_newest_tokens(tokens: Sequence[int]) -> bytes:
    """64-bit integers, as `encode_first_tokens` writes them."""
    return array("q", tokens).tobytes()


def decode_newest_tokens(payload: bytes, vocab_size: int) -> list[int]:
    """Inverse of `encode_newest_tokens`; raises `ValueError` for a payload that it cannot have made."""
    if not payload or len(payload) % 8:
        raise ValueError(f"moved tokens: {len(payload)} bytes is no positive multiple of 8")
    tokens = array("q")
    tokens.frombytes(payload)
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(f"moved tokens: a token id is out of vocabulary (0 to {vocab_size - 1})")
    return list(tokens)
