"""What all chunks and bodies of one answer share, and the JSON of usage. Built once, so that a token costs a join."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from kvbaton.cluster.http.delta import Usage
from kvbaton.engine.request import FinishReason

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """The constant fields of an answer."""

    id: str
    created: int
    model: str
    fingerprint: str

    def head(self, kind: str) -> bytes:
        """The body up to the list of choices, without its bracket."""
        fields = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return orjson.dumps(fields)[:-1] + b',"choices":'


@dataclass(frozen=True, slots=True)
class Extras:
    """What a client wants beside the text."""

    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # of a stream: null in every chunk, counted in a last one
    running_usage: bool = False  # counted in every chunk


def usage_json(usage: Usage) -> bytes:
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'
    ) % (usage.prompt, usage.completion, usage.prompt + usage.completion, usage.cached)


def finish_json(finish: FinishReason | None, tool_calls: bool = False) -> bytes:
    """One of the words that clients know."""
    if finish is None:
        return b"null"
    if finish is FinishReason.STOP:
        return b'"tool_calls"' if tool_calls else b'"stop"'
    return b'"length"'
