"""Tokens to text as they come: only whole characters are let out, and each token costs the same however long the
output is.

A character's bytes may be spread over several tokens. Byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, newer
Mistral) give the bytes of each token, so a UTF-8 decoder with a few bytes of state does it exactly. For the others
(SentencePiece's) a token's text depends on its neighbours, so the last few tokens are decoded again with it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Protocol

_WINDOW = 6
_MAX_HELD = 4  # tokens; a character has at most four bytes, so what is still broken then stays broken


class IncrementalDetokenizer(Protocol):
    """The text of one sample. Concatenated, all results equal the text of all tokens."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty for a special token or a part of a character."""
        ...

    def flush(self) -> str:
        """What is still held at the end of the output, U+FFFD for an incomplete character."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies."""

    def __init__(self, token_of: Callable[[int], str | None], skipped: AbstractSet[int]) -> None:
        self._token_of = token_of
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(unicode_to_bytes(self._token_of(token_id) or ""))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For vocabularies whose decoder looks at neighbours.

    `context` is text that is out already; `held` follows it and is not out yet.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], skipped: AbstractSet[int], prompt: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._context = [token for token in prompt[-_WINDOW:] if token not in skipped]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        text = self._text_of_held()
        if text.endswith("\ufffd") and len(self._held) < _MAX_HELD:
            return ""
        self._context = (self._context + self._held)[-_WINDOW:]
        self._held = []
        return text

    def flush(self) -> str:
        text = self._text_of_held() if self._held else ""
        self._context = (self._context + self._held)[-_WINDOW:]
        self._held = []
        return text

    def _text_of_held(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)) :]


def unicode_to_bytes(token: str) -> bytes:
    """The bytes that a byte-level token's characters stand for; an added token that uses others is plain text."""
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode()


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
