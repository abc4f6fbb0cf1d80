"""`/v1/completions`: the endpoint, and its answer as bytes, a stream of chunks or one body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.answer import (
    Extras,
    Renderer,
    TokenTexts,
    answer_head,
    chunk_end,
    extras,
    finish_json,
    json_logprob,
    stream_end,
    usage_json,
)
from kvbaton.cluster.http.call import CallBuilder, TokenBudget, check_common, time_limit_s
from kvbaton.cluster.http.errors import bad_request, unsupported
from kvbaton.cluster.http.generation import Delta, PromptRun, Usage
from kvbaton.cluster.http.prompts import Prompt, read_prompts, split_prompts
from kvbaton.cluster.http.protocol import CompletionRequest, parse_body
from kvbaton.cluster.http.reply import GenerationReply
from kvbaton.cluster.http.service import Service
from kvbaton.engine.request import FinishReason, TokenLogprobs
from kvbaton.engine.text.detokenizer import IncrementalDetokenizer

DEFAULT_MAX_TOKENS = 16  # the API's own default here; a chat goes on to the end of the context


class CompletionEndpoint:
    def __init__(self, service: Service, texts: TokenTexts) -> None:
        self._service = service
        self._texts = texts

    async def create(self, http: HttpRequest) -> Response:
        service = self._service
        body = parse_body(CompletionRequest, await http.body())
        check_common(body, service)
        check_legacy(body)
        call_id = f"cmpl-{service.new_id()}"
        calls = CallBuilder(service, body, call_id, token_budget(body), time_limit_s(http, body))
        given = split_prompts(body.prompt, service.limits.max_prompts)
        special = body.add_special_tokens is not False
        prompts = await read_prompts(service.tokenizer, service.model, given, add_special_tokens=special)
        for prompt in prompts:
            calls.add(prompt, body.logprobs, body.logprobs if body.echo else None, discard=scores_only(body))
        shape = CompletionShape(
            head=answer_head(service, call_id, "text_completion"),
            extras=extras(body, body.logprobs is not None),
            runs=calls.runs,
            samples=len(calls.runs[0].choices),
            texts=self._texts,
            echo=tuple(self._echo(prompt, body) for prompt in prompts) if body.echo else (),
            new_detokenizer=partial(
                service.tokenizer.detokenizer, skip_special_tokens=body.skip_special_tokens is not False
            ),
        )
        generation = calls.start()
        renderer: Renderer = CompletionStream(shape, generation.usage) if body.stream else CompletionWhole(shape)
        return GenerationReply(generation, renderer, stream=bool(body.stream))

    def _echo(self, prompt: Prompt, body: CompletionRequest) -> Echo:
        tokenizer = self._service.tokenizer
        text = prompt.text if prompt.text is not None else tokenizer.decode(prompt.token_ids)
        if body.logprobs is None:
            return Echo(text)
        if prompt.text is not None:
            return Echo(text, tuple(tokenizer.starts(text, body.add_special_tokens is not False)))
        places = TextPlaces(tokenizer.detokenizer())
        return Echo(text, tuple(places.next(token) for token in prompt.token_ids))


def check_legacy(body: CompletionRequest) -> None:
    if body.suffix:
        raise unsupported("suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("best_of", " unless it equals n")
    if body.prompt is None:
        raise bad_request("prompt is missing", "prompt")


def scores_only(body: CompletionRequest) -> bool:
    """`echo` with `max_tokens: 0` asks for the prompt's log-probabilities and no new text."""
    return bool(body.echo) and body.max_tokens == 0


def token_budget(body: CompletionRequest) -> TokenBudget:
    if scores_only(body):
        return TokenBudget(1)
    if "max_tokens" in body.model_fields_set:
        return TokenBudget(body.max_tokens)
    return TokenBudget(None, default=DEFAULT_MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text, and where in it each of its tokens begins where somebody asks for that."""

    text: str
    places: tuple[int, ...] = ()


class TextPlaces:
    """Where the text of each token begins, in the text that follows `start` characters."""

    __slots__ = ("_detokenizer", "_out")

    def __init__(self, detokenizer: IncrementalDetokenizer, start: int = 0) -> None:
        self._detokenizer = detokenizer
        self._out = start

    def next(self, token_id: int) -> int:
        """The place of this token, which follows those that were asked for before."""
        place = self._out + self._detokenizer.begun()
        self._out += len(self._detokenizer.push(token_id))
        return place


@dataclass(slots=True)
class LegacyLogprobs:
    """The four parallel lists of `/v1/completions`."""

    places: TextPlaces
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, texts: TokenTexts, token_id: int, logprobs: TokenLogprobs | None, place: int) -> None:
        """`place`: where the token's text begins. The first token of a prompt has no log-probability."""
        text = texts.of(token_id)
        self.tokens.append(text.label)
        self.text_offset.append(place)
        if logprobs is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(json_logprob(logprobs.logprob))
        best = {texts.of(other).label: json_logprob(value) for other, value in logprobs.top}
        best.setdefault(text.label, json_logprob(logprobs.logprob))
        self.top_logprobs.append(best)

    def take_json(self) -> bytes:
        """What was added since the last call."""
        lists = (self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset)
        body = orjson.dumps(dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), lists, strict=True)))
        for one in (self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset):
            one.clear()
        return body


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """What both forms of the answer are made from. `head` starts every chunk or body. Choice `i` is a sample of prompt
    `i // samples`; `echo` has one of each prompt, or is empty."""

    head: bytes
    extras: Extras
    runs: Sequence[PromptRun]
    samples: int
    texts: TokenTexts
    new_detokenizer: Callable[[tuple[int, ...]], IncrementalDetokenizer]
    echo: tuple[Echo, ...] = ()

    @property
    def choices(self) -> int:
        return len(self.runs) * self.samples

    def run(self, choice: int) -> PromptRun:
        return self.runs[choice // self.samples]

    def echo_text(self, choice: int) -> str:
        return self.echo[choice // self.samples].text

    def logprobs(self) -> list[LegacyLogprobs]:
        """Those of each choice, still empty; no lists at all where nobody asks for them."""
        if not self.extras.logprobs:
            return []
        starts = [len(echo.text) for echo in self.echo] or [0] * len(self.runs)
        return [
            LegacyLogprobs(TextPlaces(self.new_detokenizer(run.request.prompt), start))
            for run, start in zip(self.runs, starts, strict=True)
            for _ in range(self.samples)
        ]

    def add_prompt(self, legacy: LegacyLogprobs, choice: int) -> None:
        """The prompt's tokens, echoed with the log-probabilities that came with the first token."""
        run = self.run(choice)
        known = run.prompt_logprobs or (None,) * len(run.request.prompt)
        places = self.echo[choice // self.samples].places
        for token_id, logprobs, place in zip(run.request.prompt, known, places, strict=True):
            legacy.add(self.texts, token_id, logprobs, place)

    def add_token(self, legacy: LegacyLogprobs, delta: Delta) -> None:
        if delta.token_id is not None and delta.logprobs is not None:
            legacy.add(self.texts, delta.token_id, delta.logprobs, legacy.places.next(delta.token_id))


class CompletionStream:
    """The chunks of a stream. The echoed prompt of a choice is its first one. `count` gives the usage so far."""

    def __init__(self, shape: CompletionShape, count: Callable[[], Usage]) -> None:
        self._shape = shape
        self._count = count
        extras = shape.extras
        self._plain = not (extras.logprobs or extras.token_ids or extras.running_usage)
        self._head = b"data: " + shape.head
        self._starts = [self._head + b'[{"index":%d,"text":' % index for index in range(shape.choices)]
        self._text_end = b',"logprobs":null,"finish_reason":null}]' + self._end()
        self._legacy = shape.logprobs()
        self._unopened = set(range(shape.choices)) if shape.echo or extras.token_ids else set[int]()

    def render(self, deltas: Sequence[Delta]) -> bytes:
        out = []
        for delta in deltas:
            if delta.choice in self._unopened:
                out.append(self._opening(delta.choice))
            if delta.finish is not None or not self._plain:
                out.append(self._chunk(delta))
            elif delta.text:
                out.append(self._starts[delta.choice] + orjson.dumps(delta.text) + self._text_end)
        return b"".join(out)

    def close(self, usage: Usage) -> bytes:
        return stream_end(self._head, self._shape.extras, usage)

    def _end(self) -> bytes:
        return chunk_end(self._shape.extras, self._count)

    def _opening(self, choice: int) -> bytes:
        self._unopened.discard(choice)
        ids = b""
        if self._shape.extras.token_ids:
            ids = b',"prompt_token_ids":' + orjson.dumps(self._shape.run(choice).request.prompt) + b',"token_ids":[]'
        if self._shape.echo and self._legacy:
            self._shape.add_prompt(self._legacy[choice], choice)
        text = self._shape.echo_text(choice) if self._shape.echo else ""
        return self._assemble(choice, text, None, ids)

    def _chunk(self, delta: Delta) -> bytes:
        """Nothing where there is nothing to say: no text, no end, and nobody asked for more."""
        extras = self._shape.extras
        if not (delta.text or delta.finish or extras.logprobs or extras.token_ids):
            return b""
        if self._legacy:
            self._shape.add_token(self._legacy[delta.choice], delta)
        ids = b""
        if extras.token_ids:
            ids = b',"token_ids":' + orjson.dumps([] if delta.token_id is None else [delta.token_id])
        return self._assemble(delta.choice, delta.text, delta.finish, ids)

    def _assemble(self, choice: int, text: str, finish: FinishReason | None, ids: bytes) -> bytes:
        parts = (
            self._starts[choice],
            orjson.dumps(text),
            b',"logprobs":',
            self._legacy[choice].take_json() if self._legacy else b"null",
            b',"finish_reason":',
            finish_json(finish),
            ids,
            b"}]",
            self._end(),
        )
        return b"".join(parts)


@dataclass(slots=True)
class _Text:
    """One choice of a whole answer as it is collected."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class CompletionWhole:
    """One body, complete when `close` is called."""

    def __init__(self, shape: CompletionShape) -> None:
        self._shape = shape
        self._choices = [_Text() for _ in range(shape.choices)]
        self._legacy = shape.logprobs()
        self._unopened = set(range(shape.choices)) if shape.echo else set[int]()

    def render(self, deltas: Sequence[Delta]) -> bytes:
        for delta in deltas:
            if delta.choice in self._unopened:
                self._echo(delta.choice)
            self._add(delta)
        return b""

    def _echo(self, choice: int) -> None:
        self._unopened.discard(choice)
        self._choices[choice].text.append(self._shape.echo_text(choice))
        if self._legacy:
            self._shape.add_prompt(self._legacy[choice], choice)

    def _add(self, delta: Delta) -> None:
        text = self._choices[delta.choice]
        text.text.append(delta.text)
        text.finish = delta.finish
        if delta.token_id is not None:
            text.token_ids.append(delta.token_id)
        if self._legacy:
            self._shape.add_token(self._legacy[delta.choice], delta)

    def close(self, usage: Usage) -> bytes:
        choices = b",".join(self._choice(index, text) for index, text in enumerate(self._choices))
        return self._shape.head + b"[" + choices + b'],"usage":' + usage_json(usage) + b"}"

    def _choice(self, index: int, text: _Text) -> bytes:
        ids = b""
        if self._shape.extras.token_ids:
            prompt = orjson.dumps(self._shape.run(index).request.prompt)
            ids = b',"token_ids":' + orjson.dumps(text.token_ids) + b',"prompt_token_ids":' + prompt
        parts = (
            b'{"index":%d,"text":' % index,
            orjson.dumps("".join(text.text)),
            b',"logprobs":',
            self._legacy[index].take_json() if self._legacy else b"null",
            b',"finish_reason":',
            finish_json(text.finish),
            ids,
            b"}",
        )
        return b"".join(parts)
