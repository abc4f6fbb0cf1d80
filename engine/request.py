"""What a client asks for and what an engine answers, as plain values: no torch, no Ray, no I/O.

Those that travel whole in a session's frames are Structs, with the bounds that the wire checks on their fields
(kvtransfer/codec.py); code that makes one itself is not checked.

A `Request` is immutable. The ingress makes it, both engines of a pair receive the same one, and a resumed
request is a new `Request` with a higher `epoch` whose `emitted` tokens continue the old one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import msgspec

MAX_SAMPLES = 16
MAX_TOP_LOGPROBS = 20
MAX_ID_CHARS = 256
MAX_ERROR_CHARS = 4096
MAX_LIST = 1 << 16  # entries of a list in `SamplingParams`

Natural = Annotated[int, msgspec.Meta(ge=0)]
RequestId = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
SampleIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SAMPLES)]


class InvalidRequest(ValueError):
    """A request that no engine will accept. `param` names the offending field for the HTTP error body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class FinishReason(enum.StrEnum):
    """Why one sample ended. STOP and LENGTH are what clients see as `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ErrorCause(enum.StrEnum):
    """What kind of ERROR an end is, where something depends on it. QUEUE_FULL: nothing was begun, nothing is wrong."""

    QUEUE_FULL = "queue_full"


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the tokens of a request are chosen. All values are already checked (`check`) and defaults resolved.

    `seed` is always concrete, so that a resumed or migrated request draws the same tokens: sample `i` at sequence
    position `p` uses the random number of the key (seed, i, p) and nothing else.
    """

    max_tokens: Natural
    seed: int = 0
    temperature: float = 1.0
    top_k: Natural = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[tuple[tuple[Natural, float], ...], msgspec.Meta(max_length=MAX_LIST)] = ()
    logprobs: Natural | None = None  # None = off, 0 = chosen token only, k = also the k best
    prompt_logprobs: Natural | None = None  # same, for each prompt token
    n: Natural = 1
    min_tokens: Natural = 0
    # includes the model's end-of-sequence ids unless ignore_eos
    stop_token_ids: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_LIST)] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` for a value out of range, naming the field."""
        self._check_ranges()
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"logit_bias token id {token_id} is not in [0, {vocab_size})", "logit_bias")
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequest(f"logit_bias value {bias} is not in [-100, 100]", "logit_bias")
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"stop token id {token_id} is not in [0, {vocab_size})", "stop_token_ids")

    def _check_ranges(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{name} must be in [{low}, {high}], got {value}", name)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}", "top_p")
        if self.repetition_penalty <= 0.0:
            raise InvalidRequest("repetition_penalty must be above 0", "repetition_penalty")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})", "min_tokens")


_RANGES: tuple[tuple[str, int, int], ...] = (
    ("temperature", 0, 2),
    ("top_k", 0, 1 << 31),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
    ("logprobs", 0, MAX_TOP_LOGPROBS),
    ("prompt_logprobs", 0, MAX_TOP_LOGPROBS),
    ("n", 1, MAX_SAMPLES),
    ("max_tokens", 1, 1 << 31),
    ("min_tokens", 0, 1 << 31),
    ("seed", -(1 << 63), (1 << 63) - 1),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its sampling, as both engines of a pair see it.

    `sample_indices` are the samples to draw, normally 0..n-1. A resume is one request per unfinished sample: a
    single index, `emitted` holding the tokens the client already has (they count towards max_tokens and min_tokens),
    and a higher `epoch`. `timeout_s` is how long it may still take from now on; None: no limit of its own.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    sample_indices: tuple[int, ...] = (0,)
    emitted: tuple[int, ...] = ()
    epoch: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None

    @property
    def context(self) -> tuple[int, ...]:
        """Every token that must be in the KV cache before the next one can be sampled."""
        return self.prompt + self.emitted


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probability of one chosen token and of the `top` best ones, best first, as (token id, logprob)."""

    logprob: float
    top: tuple[tuple[Natural, float], ...] = ()


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token of one sample, numbered from 0 by `index`; the unit that travels from engine to ingress.

    A sample that ends without a new token (abort, error) has `token_id` None. `cached_tokens` and `prompt_logprobs`
    are set on the first token that an engine makes for a request (index == len(request.emitted)). `error` is for
    people, `cause` for programs.
    """

    request_id: RequestId
    epoch: Natural
    sample: SampleIndex
    index: Natural
    token_id: Natural | None
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    cached_tokens: Natural | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: Annotated[str, msgspec.Meta(max_length=MAX_ERROR_CHARS)] | None = None
    cause: ErrorCause | None = None
