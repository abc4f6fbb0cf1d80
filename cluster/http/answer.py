"""What the answers of chat and plain completions have in common: how they are rendered, the fields that every chunk and
body carries, and the texts of single tokens. Constant parts are built once, so that a token costs a join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import orjson

from kvbaton.cluster.http.generation import Delta, Usage
from kvbaton.cluster.http.protocol import GenerationFields
from kvbaton.cluster.http.service import Service
from kvbaton.engine.request import FinishReason
from kvbaton.engine.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; the API documents this number for "very unlikely"


class Renderer(Protocol):
    """Deltas to bytes. A whole answer is rendered by `close` alone."""

    def render(self, deltas: Sequence[Delta]) -> bytes:
        """What can be sent now; may be empty."""
        ...

    def close(self, usage: Usage) -> bytes:
        """The rest, once every choice is complete."""
        ...


@dataclass(frozen=True, slots=True)
class Extras:
    """What a client wants besides the text."""

    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # of a stream: null in every chunk, counted in a last one
    running_usage: bool = False  # counted in every chunk


def extras(body: GenerationFields, logprobs: bool) -> Extras:
    options = body.stream_options
    return Extras(
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        usage=options is not None and bool(options.include_usage),
        running_usage=options is not None and bool(options.continuous_usage_stats),
    )


def answer_head(service: Service, call_id: str, kind: str) -> bytes:
    """The start of every chunk or body, of object type `kind`: up to the list of choices, without its bracket."""
    fields = {
        "id": call_id,
        "object": kind,
        "created": int(service.wall_clock()),
        "model": service.model.id,
        "system_fingerprint": service.fingerprint,
    }
    return orjson.dumps(fields)[:-1] + b',"choices":'


def chunk_end(extras: Extras, count: Callable[[], Usage]) -> bytes:
    """What follows the choices of a chunk. `count` gives the usage so far, for clients that want it in every chunk."""
    if extras.running_usage:
        return b',"usage":' + usage_json(count()) + b"}\n\n"
    return b',"usage":null}\n\n' if extras.usage else b"}\n\n"


def stream_end(head: bytes, extras: Extras, usage: Usage) -> bytes:
    """What follows the last chunk with choices. `head` is that of a chunk."""
    return DONE if not extras.usage else head + b'[],"usage":' + usage_json(usage) + b"}\n\n" + DONE


def usage_json(usage: Usage) -> bytes:
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'
    ) % (usage.prompt, usage.completion, usage.prompt + usage.completion, usage.cached)


def finish_json(finish: FinishReason | None, tool_calls: bool = False) -> bytes:
    """One of the reasons that the API knows."""
    if finish is None:
        return b"null"
    if finish is FinishReason.STOP:
        return b'"tool_calls"' if tool_calls else b'"stop"'
    return b'"length"'


def json_logprob(logprob: float) -> float:
    """A log-probability as a number that JSON has."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class TokenText(NamedTuple):
    """One token alone."""

    label: str  # unique per token where it can be: the text, or "bytes:\\xe2" for a part of a character
    json: bytes  # the start of a chat entry, up to the log-probability


class TokenTexts:
    """Texts of single tokens, remembered: there are as many as the vocabulary has."""

    def __init__(self, tokenizer: Tokenizer) -> None:
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
        label = text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        start = b'{"token":%b,"bytes":%b,"logprob":' % (orjson.dumps(text), orjson.dumps(list(raw)))
        return TokenText(label, start)
