"""The endpoint under test: which model it serves, how long a prompt may be, and which token ids it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from kvbaton.cluster.bench.connection import HttpClient, Reply
from kvbaton.cluster.bench.workload import TokenIds

SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
    "A server answers requests: it reads a prompt, keeps keys and values in blocks and writes one token after another. "
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz (a+b)*c = [x, y] {z} <w> #!?&%$@^~|/_'\" "
    "def main(argv: list[str]) -> int: return sum(len(word) for word in argv) % 7\n"
    "Every morning the ferry crosses the bay, carrying bread, letters, bicycles and a few sleepy passengers. "
)


class TargetError(Exception):
    """The endpoint cannot be measured as asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Model:
    """`max_model_len` is 0 where the server does not tell."""

    name: str
    max_model_len: int


async def find_model(http: HttpClient, wanted: str | None) -> Model:
    """The model called `wanted`, or the only (first) one that the endpoint lists."""
    reply = await http.get("/v1/models")
    _expect_ok(reply, "/v1/models")
    try:
        listed = [
            (str(entry["id"]), int(entry.get("max_model_len") or 0)) for entry in orjson.loads(reply.body)["data"]
        ]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TargetError(f"/v1/models does not answer with a model list ({error!r})") from error
    for name, max_model_len in listed:
        if wanted in (None, name):
            return Model(name, max_model_len)
    raise TargetError(f"model {wanted!r} is not served; listed: {', '.join(name for name, _ in listed) or 'none'}")


async def find_vocabulary(http: HttpClient, model: str) -> list[int]:
    """Token ids that are certain to be valid: those of a sample text, from the server's `/tokenize`."""
    body = {"model": model, "prompt": SAMPLE_TEXT, "add_special_tokens": False}
    reply = await http.post("/tokenize", orjson.dumps(body))
    if reply.status in (404, 405):
        raise TargetError(
            "the endpoint has no /tokenize: give --vocab-size, the number of token ids that prompts may use"
        )
    _expect_ok(reply, "/tokenize")
    try:
        ids = sorted({int(token) for token in orjson.loads(reply.body)["tokens"]})
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TargetError(f"/tokenize does not answer with token ids ({error!r}): give --vocab-size") from error
    if len(ids) < 2:
        raise TargetError(f"/tokenize knows only {len(ids)} token id(s) in the sample text: give --vocab-size")
    return ids


def _expect_ok(reply: Reply, route: str) -> None:
    if reply.status == 401:
        raise TargetError(f"{route} wants an API key: give --api-key or set OPENAI_API_KEY")
    if reply.status != 200:
        raise TargetError(f"{route} answered {reply.status}: {reply.body[:200].decode(errors='replace')}")


@dataclass(frozen=True, slots=True)
class BodyTemplate:
    """What every completion request says besides its prompt and length. `extra` overrides anything."""

    model: str
    ignore_eos: bool
    temperature: float
    extra: tuple[tuple[str, Any], ...] = ()

    def encode(self, prompt: TokenIds, output_tokens: int) -> bytes:
        """The JSON body of a streamed completion of exactly `output_tokens` tokens (at most, without ignore_eos)."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": output_tokens}
        return orjson.dumps(body | dict(self.extra), option=orjson.OPT_SERIALIZE_NUMPY)
