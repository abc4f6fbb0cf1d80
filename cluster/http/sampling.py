"""From the fields of a request to `SamplingParams`: defaults, limits, a concrete seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kvbaton.cluster.http.errors import bad_request
from kvbaton.cluster.http.protocol import GenerationFields
from kvbaton.cluster.http.service import HttpLimits, Service
from kvbaton.engine.request import SamplingParams

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many tokens a client wants: `requested` under the name `field`, or else `default` (None: all that fit)."""

    requested: int | None
    field: str = "max_tokens"
    default: int | None = None
    prompt_field: str = "prompt"

    def resolve(self, prompt_tokens: int, max_model_len: int) -> int:
        """Tokens to generate. Raises `ApiError` when prompt and completion do not fit."""
        room = max_model_len - prompt_tokens
        if room < 1:
            raise bad_request(
                f"the prompt has {prompt_tokens} tokens; with at least one of completion that is more than the model's "
                f"context length of {max_model_len}",
                self.prompt_field,
                "context_length_exceeded",
            )
        if self.requested is None:
            return room if self.default is None else min(self.default, room)
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


@dataclass(frozen=True, slots=True)
class LogprobDepth:
    """None = off, 0 = the token itself, k = also the k best."""

    output: int | None = None
    prompt: int | None = None


def sampling_params(body: GenerationFields, service: Service, max_tokens: int, depth: LogprobDepth) -> SamplingParams:
    """Checked sampling of one prompt. Raises `InvalidRequest` or `ApiError` naming the field."""
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
        logprobs=depth.output,
        prompt_logprobs=depth.prompt,
        n=_or(body.n, 1),
        min_tokens=_or(body.min_tokens, 0),
        stop_token_ids=_stop_token_ids(body, service.model.eos_ids),
        ignore_eos=bool(body.ignore_eos),
    )
    params.check(service.model.vocab_size)
    return params


def stop_strings(stop: str | list[str] | None, limits: HttpLimits) -> tuple[str, ...]:
    """The stop strings of a request, each once. Raises `ApiError`."""
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
