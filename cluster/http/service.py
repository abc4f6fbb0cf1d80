"""What the HTTP layer is given: the cluster behind one method, a tokenizer, the model's limits, clocks and settings."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvbaton.cluster.client.api import GenerationClient
from kvbaton.cluster.http.errors import ApiError
from kvbaton.cluster.http.limits import HttpLimits
from kvbaton.cluster.http.metrics import HttpMetrics
from kvbaton.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model. `max_model_len` bounds prompt and completion together."""

    id: str
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...] = ()
    created: int = 0


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Used where a request leaves a field out; a model's generation_config may set its own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and completion together; used where `max_new_tokens` is not set

    def new_tokens(self, prompt_tokens: int) -> int | None:
        """How long a completion is by the model's own settings; None where they say nothing of such a prompt."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        return self.max_length - prompt_tokens if self.max_length > prompt_tokens else None


def random_seed() -> int:
    """63 random bits: a non-negative int64."""
    return int.from_bytes(os.urandom(8), "big") >> 1


def random_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Service:
    """One ingress replica. Empty `api_keys`: no key is asked. `cancel_elsewhere` tells the other replicas of a
    cancelled call, where there are others."""

    client: GenerationClient
    tokenizer: Tokenizer
    model: ModelCard
    version: str
    defaults: SamplingDefaults = SamplingDefaults()
    limits: HttpLimits = field(default_factory=HttpLimits)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    cancel_elsewhere: Callable[[str], Awaitable[bool]] | None = None
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    new_seed: Callable[[], int] = random_seed
    new_id: Callable[[], str] = random_id

    @property
    def fingerprint(self) -> str:
        return f"kvbaton-{self.version}"

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` 404 for a model that is not the one served; no name means that one."""
        if name is not None and name != self.model.id:
            raise ApiError(404, f"the model {name[:200]!r} does not exist", "model", "model_not_found")
