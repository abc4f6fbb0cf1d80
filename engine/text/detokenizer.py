"""Tokens to text as they come: only whole characters are let out, and each token costs the same however long the
output is.

A character's bytes may be spread over several tokens. Byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, newer
Mistral) give the bytes of each token, so a UTF-8 decoder with a few bytes of state does it exactly. For the others
(SentencePiece's, WordPiece's) a token's text depends on what precedes it, so it is decoded behind the token before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Protocol

_MAX_HELD = 4  # tokens; a character has at most four bytes, so what is still broken then stays broken
# Byte tokens that may wait for the end of their run: a script without spaces that the vocabulary lacks would otherwise
# not stream at all.
MAX_RUN = 64


class IncrementalDetokenizer(Protocol):
    """The text of one sample. Concatenated, all results equal the text of all tokens."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; empty for a special token or a part of a character."""
        ...

    def flush(self) -> str:
        """What is still held at the end of the output, U+FFFD for an incomplete character."""
        ...

    def whole(self) -> str:
        """Held text of whole characters, which `flush` would give; empty where a part of one is held."""
        ...

    def begun(self) -> int:
        """How many characters have begun in the tokens so far and are not out."""
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

    def whole(self) -> str:
        return ""

    def begun(self) -> int:
        return 1 if self._utf8.getstate()[0] else 0


class PieceDetokenizer:
    """For vocabularies whose decoder looks at neighbours.

    `context` is the token before, whose text is out; `held` follows it and is not out yet. A run of byte tokens (those
    that `byte_of` knows) is one thing to the decoder: characters where all of it is UTF-8, else U+FFFD for each byte.
    So `run` is held until another token ends it, until it is broken, or for `MAX_RUN` tokens.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        byte_of: Callable[[int], int | None],
        skipped: AbstractSet[int],
        prompt: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._byte_of = byte_of
        self._skipped = skipped
        self._context = [token for token in prompt[-MAX_RUN:] if token not in skipped][-1:]
        self._held: list[int] = []
        self._run: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self._chars = ""  # the whole characters of the run
        self._broken = False

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        byte = self._byte_of(token_id)
        if byte is not None:
            return self._take_held() + self._push_byte(token_id, byte)
        ended = self._end_run()
        self._held.append(token_id)
        if len(self._held) < _MAX_HELD and self._text_of_held().endswith("\ufffd"):
            return ended
        return ended + self._take_held()

    def flush(self) -> str:
        return self._take_held() + self._end_run()

    def whole(self) -> str:
        return "" if self._incomplete() else self._chars

    def begun(self) -> int:
        return len(self._chars) + bool(self._held or self._incomplete())

    def _push_byte(self, token_id: int, byte: int) -> str:
        if self._broken:
            return "\ufffd"
        self._run.append(token_id)
        try:
            self._chars += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken, self._chars = True, ""
            self._utf8.reset()
            self._context = self._context or [token_id]
            return "\ufffd" * len(self._run)
        return self._end_of_long_run() if len(self._run) >= MAX_RUN else ""

    def _end_of_long_run(self) -> str:
        """The whole characters; what has begun is the start of a run of its own."""
        left = len(self._run) - len(self._utf8.getstate()[0])
        whole = self._decode(self._run[:left]) if not self._context else self._chars
        self._context = self._context or self._run[:1]
        self._run, self._chars = self._run[left:], ""
        return whole

    def _end_run(self) -> str:
        if not self._run:
            return ""
        text = self._chars
        if not self._context:
            text = self._decode(self._run)  # a space at the very start may not count
            self._context = self._run[-1:]  # what follows is not the start
        elif self._incomplete():
            text = "\ufffd" * len(self._run)
        self._run, self._chars, self._broken = [], "", False
        self._utf8.reset()
        return text

    def _take_held(self) -> str:
        if not self._held:
            return ""
        text = self._text_of_held()
        if text or not self._context:
            self._context = self._held
        self._held = []
        return text

    def _text_of_held(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)) :]

    def _incomplete(self) -> bool:
        return bool(self._utf8.getstate()[0])


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
