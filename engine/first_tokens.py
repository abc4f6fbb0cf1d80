"""The payload of a hand-off: the first token of each sample that goes on, as prefill drew it."""

from __future__ import annotations

from array import array


def encode_first_tokens(tokens: dict[int, int]) -> bytes:
    """`tokens` maps sample index to token id; little-endian int64 pairs."""
    return array("q", [value for pair in tokens.items() for value in pair]).tobytes()


def decode_first_tokens(payload: bytes) -> dict[int, int]:
    """Inverse of `encode_first_tokens`; raises `ValueError` for a payload that it cannot have made."""
    if len(payload) % 16:
        raise ValueError(f"first tokens: {len(payload)} bytes is not a multiple of 16")
    values = array("q")
    values.frombytes(payload)
    return dict(zip(values[::2], values[1::2], strict=True))
