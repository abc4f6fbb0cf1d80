"""`/v1/chat/completions`: the endpoint, and its answer as bytes, a stream of chunks or one body.

Both forms of the answer read tool calls with the same parser, and differ in what they do with its events.
"""

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
from kvbaton.cluster.http.generation import Delta, Usage
from kvbaton.cluster.http.prompts import read_chat, uses_tools
from kvbaton.cluster.http.protocol import ChatRequest, parse_body
from kvbaton.cluster.http.reply import GenerationReply
from kvbaton.cluster.http.service import Service
from kvbaton.cluster.http.tools import TAGS, CallArguments, CallStart, Content, ToolCallParser, ToolEvent
from kvbaton.engine.request import MAX_TOP_LOGPROBS, FinishReason, TokenLogprobs


class ChatEndpoint:
    def __init__(self, service: Service, texts: TokenTexts) -> None:
        self._service = service
        self._texts = texts

    async def create(self, http: HttpRequest) -> Response:
        service = self._service
        body = parse_body(ChatRequest, await http.body())
        check_common(body, service)
        if body.echo:
            raise unsupported("echo", " here: use /v1/completions")
        logprobs = top_logprobs(body)
        call_id = f"chatcmpl-{service.new_id()}"
        calls = CallBuilder(service, body, call_id, token_budget(body), time_limit_s(http, body))
        prompt = await read_chat(service.tokenizer, service.model, body)
        parser = self._parser(body)
        calls.add(prompt, logprobs, shown=() if parser is None else TAGS)
        shape = ChatShape(
            head=answer_head(service, call_id, "chat.completion.chunk" if body.stream else "chat.completion"),
            extras=extras(body, logprobs is not None),
            choices=len(calls.runs[0].choices),
            prompt_ids=prompt.token_ids,
            texts=self._texts,
            new_parser=parser,
        )
        generation = calls.start()
        renderer: Renderer = ChatStream(shape, generation.usage) if body.stream else ChatWhole(shape)
        return GenerationReply(generation, renderer, stream=bool(body.stream))

    def _parser(self, body: ChatRequest) -> partial[ToolCallParser] | None:
        if not uses_tools(body):
            return None
        return partial(ToolCallParser, self._service.new_id, body.parallel_tool_calls is not False)


def token_budget(body: ChatRequest) -> TokenBudget:
    if body.max_completion_tokens is not None:
        return TokenBudget(body.max_completion_tokens, "max_completion_tokens", prompt_field="messages")
    return TokenBudget(body.max_tokens, prompt_field="messages")


def top_logprobs(body: ChatRequest) -> int | None:
    """Whose log-probabilities are wanted: None = nobody's, 0 = the token's, k = also those of the k best.

    Raises `ApiError` where the two fields contradict each other or a range.
    """
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise bad_request(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {body.top_logprobs}", "top_logprobs")
    if body.top_logprobs > 0 and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


@dataclass(frozen=True, slots=True)
class ChatShape:
    """What both forms of the answer are made from. `head` starts every chunk or body. `new_parser` is None where no
    tools were given: then all text is content."""

    head: bytes
    extras: Extras
    choices: int
    prompt_ids: tuple[int, ...]
    texts: TokenTexts
    new_parser: Callable[[], ToolCallParser] | None = None

    def parsers(self) -> list[ToolCallParser] | None:
        return None if self.new_parser is None else [self.new_parser() for _ in range(self.choices)]


class ChatStream:
    """The chunks of a stream. `count` gives the usage so far."""

    def __init__(self, shape: ChatShape, count: Callable[[], Usage]) -> None:
        self._shape = shape
        self._count = count
        self._parsers = shape.parsers()
        extras = shape.extras
        self._plain = self._parsers is None and not (extras.logprobs or extras.token_ids or extras.running_usage)
        self._head = b"data: " + shape.head
        self._starts = [self._head + b'[{"index":%d,"delta":' % index for index in range(shape.choices)]
        self._texts = [start + b'{"content":' for start in self._starts]
        self._text_end = b'},"logprobs":null,"finish_reason":null}]' + self._end()
        self._opened = False

    def render(self, deltas: Sequence[Delta]) -> bytes:
        out = [] if self._opened else [self._opening()]
        for delta in deltas:
            if delta.finish is not None or not self._plain:
                out.append(self._chunks(delta))
            elif delta.text:
                out.append(self._texts[delta.choice] + orjson.dumps(delta.text) + self._text_end)
        return b"".join(out)

    def close(self, usage: Usage) -> bytes:
        return stream_end(self._head, self._shape.extras, usage)

    def _opening(self) -> bytes:
        """The first delta of each choice names the role; the prompt's ids are in these chunks alone."""
        self._opened = True
        rest = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        if self._shape.extras.token_ids:
            rest += b',"prompt_token_ids":' + orjson.dumps(self._shape.prompt_ids)
        return b"".join(start + rest + self._end() for start in self._starts)

    def _end(self) -> bytes:
        return chunk_end(self._shape.extras, self._count)

    def _chunks(self, delta: Delta) -> bytes:
        """All chunks of one step. Log-probabilities and ids go with the first, the finish reason with the last."""
        parser = self._parsers[delta.choice] if self._parsers is not None else None
        pieces = delta_pieces(delta, parser)
        carries = self._shape.extras.token_ids or (self._shape.extras.logprobs and delta.logprobs is not None)
        if not pieces and (carries or delta.finish is not None):
            pieces.append(b"{}")
        last = len(pieces) - 1
        calls = parser is not None and parser.calls > 0
        return b"".join(
            self._starts[delta.choice]
            + piece
            + (self._logprobs(delta) if index == 0 else b',"logprobs":null')
            + b',"finish_reason":'
            + finish_json(delta.finish if index == last else None, calls)
            + (self._ids(delta) if index == 0 else b"")
            + b"}]"
            + self._end()
            for index, piece in enumerate(pieces)
        )

    def _logprobs(self, delta: Delta) -> bytes:
        if not self._shape.extras.logprobs or delta.logprobs is None or delta.token_id is None:
            return b',"logprobs":null'
        return b',"logprobs":' + chat_logprobs([chat_entry(self._shape.texts, delta.token_id, delta.logprobs)])

    def _ids(self, delta: Delta) -> bytes:
        if not self._shape.extras.token_ids:
            return b""
        return b',"token_ids":' + orjson.dumps([] if delta.token_id is None else [delta.token_id])


def delta_pieces(delta: Delta, parser: ToolCallParser | None) -> list[bytes]:
    """The JSON of each delta object of one step. After a tool call the finish reason gets an empty one of its own."""
    if parser is None:
        return [b'{"content":' + orjson.dumps(delta.text) + b"}"] if delta.text else []
    pieces = [event_json(event) for event in parse_step(delta, parser)]
    if delta.finish is not None and parser.calls and pieces:
        pieces.append(b"{}")
    return pieces


def parse_step(delta: Delta, parser: ToolCallParser) -> list[ToolEvent]:
    events = parser.push(delta.text)
    return events if delta.finish is None else events + parser.finish()


def event_json(event: ToolEvent) -> bytes:
    """Name, id and type once; then index and fragments of the arguments."""
    match event:
        case Content(text):
            return b'{"content":' + orjson.dumps(text) + b"}"
        case CallStart(index, call_id, name):
            function: dict[str, object] = {"name": name, "arguments": ""}
            call: dict[str, object] = {"index": index, "id": call_id, "type": "function", "function": function}
        case CallArguments(index, text):
            call = {"index": index, "function": {"arguments": text}}
    return orjson.dumps({"tool_calls": [call]})


@dataclass(slots=True)
class _Message:
    """One choice of a whole answer as it is collected."""

    text: list[str] = field(default_factory=list)
    calls: list[CallStart] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def add_event(self, event: ToolEvent) -> None:
        match event:
            case Content(text):
                self.text.append(text)
            case CallStart():
                self.calls.append(event)
                self.arguments.append([])
            case CallArguments(index, text):
                self.arguments[index].append(text)

    def json(self) -> bytes:
        content = "".join(self.text)
        message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "".join(text)}}
                for call, text in zip(self.calls, self.arguments, strict=True)
            ]
        return orjson.dumps(message)


class ChatWhole:
    """One body, complete when `close` is called."""

    def __init__(self, shape: ChatShape) -> None:
        self._shape = shape
        self._parsers = shape.parsers()
        self._messages = [_Message() for _ in range(shape.choices)]

    def render(self, deltas: Sequence[Delta]) -> bytes:
        for delta in deltas:
            self._add(self._messages[delta.choice], delta)
        return b""

    def _add(self, message: _Message, delta: Delta) -> None:
        if self._parsers is None:
            message.text.append(delta.text)
        else:
            for event in parse_step(delta, self._parsers[delta.choice]):
                message.add_event(event)
        if delta.token_id is not None:
            message.token_ids.append(delta.token_id)
            if self._shape.extras.logprobs and delta.logprobs is not None:
                message.logprobs.append(chat_entry(self._shape.texts, delta.token_id, delta.logprobs))
        message.finish = delta.finish

    def close(self, usage: Usage) -> bytes:
        choices = b",".join(self._choice(index, message) for index, message in enumerate(self._messages))
        body = self._shape.head + b"[" + choices + b'],"usage":' + usage_json(usage)
        if self._shape.extras.token_ids:
            body += b',"prompt_token_ids":' + orjson.dumps(self._shape.prompt_ids)
        return body + b"}"

    def _choice(self, index: int, message: _Message) -> bytes:
        wanted = self._shape.extras
        parts = (
            b'{"index":%d,"message":' % index,
            message.json(),
            b',"logprobs":',
            chat_logprobs(message.logprobs) if wanted.logprobs else b"null",
            b',"finish_reason":',
            finish_json(message.finish, bool(message.calls)),
            b',"token_ids":' + orjson.dumps(message.token_ids) if wanted.token_ids else b"",
            b"}",
        )
        return b"".join(parts)


def chat_entry(texts: TokenTexts, token_id: int, logprobs: TokenLogprobs) -> bytes:
    """One element of `logprobs.content`."""
    top = b",".join(texts.of(other).json + b"%b}" % orjson.dumps(json_logprob(value)) for other, value in logprobs.top)
    return texts.of(token_id).json + b'%b,"top_logprobs":[%b]}' % (orjson.dumps(json_logprob(logprobs.logprob)), top)


def chat_logprobs(entries: Sequence[bytes]) -> bytes:
    return b'{"content":[' + b",".join(entries) + b'],"refusal":null}'
