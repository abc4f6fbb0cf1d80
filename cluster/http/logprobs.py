"""Log-probabilities as JSON, in the two forms that clients know, and the text of single tokens that both need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from kvbaton.cluster.http.service import TextTokenizer
from kvbaton.engine.request import TokenLogprobs

LOWEST = -9999.0  # JSON has no -inf; the word that the API documents for "very unlikely"


class TokenText(NamedTuple):
    """One token alone. `chars` counts the characters that begin in it: none for a special token that text omits."""

    label: str  # unique per token where it can be: the text, or "bytes:\\xe2" for a part of a character
    chars: int
    json: bytes  # the start of a chat entry, up to the log-probability


class TokenTexts:
    """Texts of single tokens, remembered: there are as many as the vocabulary has."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def _read(self, token_id: int) -> TokenText:
        raw = self._tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", errors="replace")
        special = self._tokenizer.decode([token_id], skip_special_tokens=True) == ""
        label = text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        chars = 0 if special else sum(byte & 0xC0 != 0x80 for byte in raw)
        start = b'{"token":%b,"bytes":%b,"logprob":' % (orjson.dumps(text), orjson.dumps(list(raw)))
        return TokenText(label, chars, start)


def number(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def chat_entry(texts: TokenTexts, token_id: int, logprobs: TokenLogprobs) -> bytes:
    """One element of `logprobs.content`."""
    top = b",".join(texts.of(other).json + b"%b}" % orjson.dumps(number(value)) for other, value in logprobs.top)
    return texts.of(token_id).json + b'%b,"top_logprobs":[%b]}' % (orjson.dumps(number(logprobs.logprob)), top)


def chat_logprobs(entries: Sequence[bytes]) -> bytes:
    return b'{"content":[' + b",".join(entries) + b'],"refusal":null}'


@dataclass(slots=True)
class LegacyLogprobs:
    """The four parallel lists of `/v1/completions`. `offset` is where the next token's text begins."""

    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, texts: TokenTexts, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The first token of a prompt has no log-probability: nothing precedes it."""
        text = texts.of(token_id)
        self.tokens.append(text.label)
        self.text_offset.append(self.offset)
        self.offset += text.chars
        if logprobs is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(number(logprobs.logprob))
        best = {texts.of(other).label: number(value) for other, value in logprobs.top}
        best.setdefault(text.label, number(logprobs.logprob))
        self.top_logprobs.append(best)

    def take_json(self) -> bytes:
        """What was added since the last call."""
        lists = (self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset)
        body = orjson.dumps(dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), lists, strict=True)))
        for one in (self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset):
            one.clear()
        return body
