"""A call on its way in: from a checked body to the requests that the cluster is given, and their cancelling.

    body  ->  token budget, stop strings, time limit  ->  a Request and its choices for each prompt  ->  Generation

Chat and plain completions share all of this; what differs they pass in. Everything here raises `ApiError`, or
`InvalidRequest` where the engine's own rules are broken, before any work has been spent.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from kvbaton.cluster.client.api import GenerationClient
from kvbaton.cluster.http.errors import bad_request
from kvbaton.cluster.http.generation import ChoiceText, Generation, PromptRun, TextRules
from kvbaton.cluster.http.limits import HttpLimits
from kvbaton.cluster.http.metrics import CallTimer
from kvbaton.cluster.http.prompts import Prompt
from kvbaton.cluster.http.protocol import GenerationFields
from kvbaton.cluster.http.service import Service
from kvbaton.engine.request import Request, SamplingParams

MAX_SALT_CHARS = 1024
TIMEOUT_HEADER = "x-request-timeout"

Number = TypeVar("Number", int, float)


def check_common(body: GenerationFields, service: Service) -> None:
    service.check_model(body.model)
    body.check_supported()
    if body.cache_salt is not None and len(body.cache_salt) > MAX_SALT_CHARS:
        raise bad_request(f"cache_salt is longer than {MAX_SALT_CHARS} characters", "cache_salt")


def time_limit_s(http: HttpRequest, body: GenerationFields) -> float | None:
    """The field `timeout`, or the header, in seconds; None where the client sets no limit."""
    if body.timeout is not None:
        return body.timeout
    header = http.headers.get(TIMEOUT_HEADER)
    if header is None:
        return None
    try:
        return float(header)
    except ValueError:
        raise bad_request(f"{TIMEOUT_HEADER} must be a number of seconds, got {header[:40]!r}", "timeout") from None


def request_name(call_id: str, prompt: int) -> str:
    """What the cluster calls the request of one prompt of a call."""
    return f"{call_id}-{prompt}"


def cancel_call(client: GenerationClient, call_id: str, max_prompts: int) -> bool:
    """Cancel every prompt of a call that is in progress here; False if there was none."""
    return sum(client.cancel(request_name(call_id, prompt)) for prompt in range(max_prompts)) > 0


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many tokens a client wants: `requested` under the name `field`, or else what the model's own settings say, or
    else `default` (None: all that fit)."""

    requested: int | None
    field: str = "max_tokens"
    default: int | None = None
    prompt_field: str = "prompt"

    def resolve(self, prompt_tokens: int, max_model_len: int, models_own: int | None = None) -> int:
        """Tokens to generate; `models_own` is the model's default. Raises `ApiError` when prompt and completion do not
        fit."""
        room = max_model_len - prompt_tokens
        if room < 1:
            raise bad_request(
                f"the prompt has {prompt_tokens} tokens; with at least one of completion that is more than the model's "
                f"context length of {max_model_len}",
                self.prompt_field,
                "context_length_exceeded",
            )
        if self.requested is None:
            default = self.default if models_own is None else models_own
            return room if default is None else min(default, room)
        if self.requested < 1:
            raise bad_request(f"{self.field} must be at least 1, got {self.requested}", self.field)
        if self.requested > room:
            raise bad_request(
                f"{prompt_tokens} prompt tokens and {self.field} = {self.requested} are more than the model's context "
                f"length of {max_model_len}",
                self.field,
                "context_length_exceeded",
            )
        return self.requested


class CallBuilder:
    """Makes the requests of one call, prompt after prompt, and numbers its choices."""

    def __init__(
        self,
        service: Service,
        body: GenerationFields,
        call_id: str,
        budget: TokenBudget,
        timeout_s: float | None = None,
    ) -> None:
        self.runs: list[PromptRun] = []
        self._service = service
        self._body = body
        self._call_id = call_id
        self._budget = budget
        self._timeout_s = timeout_s
        self._stops = stop_strings(body.stop, service.limits)

    def add(
        self,
        prompt: Prompt,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        discard: bool = False,
        shown: Collection[str] = (),
    ) -> None:
        """One prompt with its n choices.

        `logprobs` and `prompt_logprobs`: None = off, 0 = of the token itself, k = also of the k best. `discard`: the
        answer is to have no new text. `shown`: special tokens that are text even where others are skipped.
        """
        service, body = self._service, self._body
        length = len(prompt.token_ids)
        max_tokens = self._budget.resolve(length, service.model.max_model_len, service.defaults.new_tokens(length))
        params = sampling_params(body, service, max_tokens, logprobs, prompt_logprobs)
        request = Request(
            request_id=request_name(self._call_id, len(self.runs)),
            prompt=prompt.token_ids,
            sampling=params,
            sample_indices=tuple(range(params.n)),
            cache_salt=body.cache_salt or "",
            timeout_s=self._timeout_s,
        )
        rules = TextRules(
            stops=self._stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            min_tokens=params.min_tokens,
            discard=discard,
        )
        first = len(self.runs) * params.n
        detokenizer = service.tokenizer.detokenizer
        choices = [
            ChoiceText(first + sample, detokenizer(prompt.token_ids, rules.skip_special, shown), rules)
            for sample in range(params.n)
        ]
        self.runs.append(PromptRun(request, choices))

    def start(self) -> Generation:
        timer = CallTimer(self._service.metrics, self._service.clock)
        return Generation(self._service.client, self.runs, timer)


def sampling_params(
    body: GenerationFields, service: Service, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """How one prompt is sampled: the body's fields or the defaults, a concrete seed. Errors name the field."""
    defaults = service.defaults
    top_k = _or(body.top_k, defaults.top_k)
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=service.new_seed() if body.seed is None else body.seed,
        temperature=_or(body.temperature, defaults.temperature),
        top_k=0 if top_k == -1 else top_k,
        top_p=_or(body.top_p, defaults.top_p),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        n=_or(body.n, 1),
        min_tokens=_or(body.min_tokens, 0),
        stop_token_ids=_stop_token_ids(body, service.model.eos_ids),
        ignore_eos=bool(body.ignore_eos),
    )
    params.check(service.model.vocab_size)
    return params


def stop_strings(stop: str | list[str] | None, limits: HttpLimits) -> tuple[str, ...]:
    """The stop strings of a request, each once."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > limits.max_stop_strings:
        raise bad_request(f"stop has {len(stops)} strings; at most {limits.max_stop_strings} are allowed", "stop")
    for text in stops:
        if not text:
            raise bad_request("stop must not contain an empty string", "stop")
        if len(text) > limits.max_stop_chars:
            raise bad_request(f"a stop string has {len(text)} characters; at most {limits.max_stop_chars}", "stop")
    return tuple(dict.fromkeys(stops))


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    try:
        return tuple((int(token), value) for token, value in bias.items())
    except ValueError:
        raise bad_request("logit_bias keys must be token ids", "logit_bias") from None


def _stop_token_ids(body: GenerationFields, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(body.stop_token_ids or ())
    return tuple(dict.fromkeys(own if body.ignore_eos else own + eos_ids))
