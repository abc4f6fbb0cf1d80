"""`/v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.calls import CallBuilder, check_common, envelope, extras
from kvbaton.cluster.http.cancel import time_limit_s
from kvbaton.cluster.http.chat_render import ChatShape, ChatStream, ChatWhole
from kvbaton.cluster.http.errors import bad_request, unsupported
from kvbaton.cluster.http.logprobs import TokenTexts
from kvbaton.cluster.http.prompts import read_chat, uses_tools
from kvbaton.cluster.http.protocol import ChatRequest, parse_body
from kvbaton.cluster.http.reply import GenerationReply, Renderer
from kvbaton.cluster.http.sampling import LogprobDepth, TokenBudget
from kvbaton.cluster.http.service import Service
from kvbaton.cluster.http.tools import ToolCallParser
from kvbaton.engine.request import MAX_TOP_LOGPROBS


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
        depth = logprob_depth(body)
        call_id = f"chatcmpl-{service.new_id()}"
        calls = CallBuilder(service, body, call_id, token_budget(body), time_limit_s(http, body))
        prompt = await read_chat(service.tokenizer, service.model, body)
        calls.add(prompt, depth)
        shape = ChatShape(
            envelope=envelope(service, call_id),
            extras=extras(body, depth.output is not None),
            choices=len(calls.runs[0].samples),
            prompt_ids=prompt.token_ids,
            texts=self._texts,
            new_parser=self._parser(body),
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


def logprob_depth(body: ChatRequest) -> LogprobDepth:
    """Raises `ApiError` where the two fields contradict each other or a range."""
    if body.top_logprobs is None:
        return LogprobDepth(0 if body.logprobs else None)
    if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise bad_request(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {body.top_logprobs}", "top_logprobs")
    if body.top_logprobs > 0 and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    return LogprobDepth(body.top_logprobs if body.logprobs else None)
