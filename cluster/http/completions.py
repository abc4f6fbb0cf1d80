"""`/v1/completions`."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.calls import CallBuilder, check_common, envelope, extras
from kvbaton.cluster.http.cancel import time_limit_s
from kvbaton.cluster.http.completion_render import CompletionShape, CompletionStream, CompletionWhole
from kvbaton.cluster.http.errors import bad_request, unsupported
from kvbaton.cluster.http.logprobs import TokenTexts
from kvbaton.cluster.http.prompts import Prompt, read_prompts, split_prompts
from kvbaton.cluster.http.protocol import CompletionRequest, parse_body
from kvbaton.cluster.http.reply import GenerationReply, Renderer
from kvbaton.cluster.http.sampling import LogprobDepth, TokenBudget
from kvbaton.cluster.http.service import Service

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
        prompts = split_prompts(body.prompt, service.limits.max_prompts)
        depth = LogprobDepth(body.logprobs, body.logprobs if body.echo else None)
        for prompt in await read_prompts(
            service.tokenizer, service.model, prompts, add_special_tokens=body.add_special_tokens is not False
        ):
            calls.add(prompt, depth, scores_only(body))
        shape = CompletionShape(
            envelope=envelope(service, call_id),
            extras=extras(body, body.logprobs is not None),
            runs=calls.runs,
            samples=len(calls.runs[0].samples),
            texts=self._texts,
            echo=tuple(self._echo_text(run.prompt) for run in calls.runs) if body.echo else (),
        )
        generation = calls.start()
        renderer: Renderer = CompletionStream(shape, generation.usage) if body.stream else CompletionWhole(shape)
        return GenerationReply(generation, renderer, stream=bool(body.stream))

    def _echo_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._service.tokenizer.decode(prompt.token_ids, skip_special_tokens=True)


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
