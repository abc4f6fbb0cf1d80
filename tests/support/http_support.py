"""What the HTTP tests stand on: a client that plays a script, the real tiny tokenizer, callers without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from kvbaton.cluster.http.service import ModelCard, Service
from kvbaton.engine.request import FinishReason, Request, TokenLogprobs, TokenOutput
from kvbaton.engine.text.tiny_tokenizer import IM_END, VOCAB_SIZE, save_tokenizer
from kvbaton.engine.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 256
MODEL_ID = "tiny/harbour"

Step = list[TokenOutput] | Exception | asyncio.Event
Script = Callable[[Request], Iterable[Step]]


class ScriptedClient:
    """A `GenerationClient` that plays what `script` says: outputs, a failure, or an event to wait for.

    `closed` has a request's id once for each time its stream ended or was closed; `running` those still open.
    """

    def __init__(self, script: Script, ready: bool = True) -> None:
        self.script = script
        self.is_ready = ready
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.closed: list[str] = []
        self.aborted: list[str] = []
        self.finished_samples: list[tuple[str, int]] = []
        self.cancelled: list[str] = []
        self.started = asyncio.Event()
        self.all_closed = asyncio.Event()

    def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        return self._play(request)

    async def _play(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        self.requests.append(request)
        self.running.add(request.request_id)
        self.started.set()
        complete = False
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
            complete = True
        finally:
            self.running.remove(request.request_id)
            self.closed.append(request.request_id)
            if not complete:
                self.aborted.append(request.request_id)
            if not self.running:
                self.all_closed.set()

    def finish_sample(self, request_id: str, sample: int) -> None:
        self.finished_samples.append((request_id, sample))

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return request_id in self.running

    def ready(self) -> bool:
        return self.is_ready


def outputs(
    request: Request,
    tokens: Sequence[int],
    sample: int = 0,
    finish: FinishReason | None = FinishReason.LENGTH,
    cached: int | None = 0,
) -> list[TokenOutput]:
    """The outputs of one sample; the last one finishes it. Log-probabilities as the request asks for them."""
    last = len(tokens) - 1
    return [
        TokenOutput(
            request.request_id,
            request.epoch,
            sample,
            index,
            token,
            logprobs=fake_logprobs(token, request.sampling.logprobs),
            finish=finish if index == last else None,
            cached_tokens=cached if index == 0 else None,
            prompt_logprobs=_prompt_logprobs(request) if index == 0 else None,
        )
        for index, token in enumerate(tokens)
    ]


def fake_logprobs(token: int, depth: int | None) -> TokenLogprobs | None:
    """The token itself at -0.5, then its neighbours, each half a nat less likely."""
    if depth is None:
        return None
    return TokenLogprobs(-0.5, tuple(((token + i) % VOCAB_SIZE, -0.5 * (i + 1)) for i in range(depth)))


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...] | None:
    depth = request.sampling.prompt_logprobs
    if depth is None:
        return None
    return (None, *(fake_logprobs(token, depth) for token in request.prompt[1:]))


def say(tokenizer: Tokenizer, text: str, finish: FinishReason = FinishReason.LENGTH) -> Script:
    """Every sample says `text`, a token at a time, all samples in step; STOP adds the end token."""

    def script(request: Request) -> Iterable[Step]:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if finish is FinishReason.STOP:
            tokens.append(end_token(tokenizer))
        rows = [outputs(request, tokens, sample, finish) for sample in request.sample_indices]
        return [list(step) for step in zip(*rows, strict=True)]

    return script


def end_token(tokenizer: Tokenizer) -> int:
    """The id that ends an answer."""
    (token,) = tokenizer.encode(IM_END, add_special_tokens=False)
    return token


def chat_prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
    """The ids of a conversation; the template writes its own BOS."""
    text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tiny models' tokenizer, its template extended by tools as Qwen's has them."""
    save_tokenizer(folder, MAX_MODEL_LEN)
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    hf.chat_template = "{%- if tools %}{{- 'Tools: ' + tools | tojson + '\\n' }}{%- endif %}" + hf.chat_template
    return Tokenizer(hf)


def make_service(client: ScriptedClient, tokenizer: Tokenizer, **settings: Any) -> Service:
    card = ModelCard(MODEL_ID, VOCAB_SIZE, MAX_MODEL_LEN, (end_token(tokenizer),), created=1_700_000_000)
    return Service(client=client, tokenizer=tokenizer, model=card, version="0.0.test", **settings)


def http_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=30)


def sse_events(body: str) -> list[dict[str, Any]]:
    """The JSON events of a stream that ends as it should, with [DONE]."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class RawCall:
    """One call made by hand, so that a test decides when the client leaves and sees what was sent when."""

    def __init__(self, app: FastAPI, path: str, body: object, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.sent: list[dict[str, Any]] = []
        self.first_chunk = asyncio.Event()
        self.fail_sends: Exception | None = None
        self._leave = asyncio.Event()
        self._body: list[bytes] = [json.dumps(body).encode()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._leave.set()

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.fail_sends is not None:
            raise self.fail_sends
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first_chunk.set()
