"""What happened to one request of a run, with every time in seconds since the run's start."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request did not complete. `kind` is short and groups equal failures: `http 429`, `timeout`, `truncated`."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a request should have been sent, was sent, and when its tokens came.

    `token_times_s` has one entry per output token where the server names token ids in each chunk, otherwise one per
    chunk with text. Tokens of one chunk have the same time.
    """

    scheduled_s: float
    sent_s: float
    ended_s: float
    token_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the client saw it. Token counts are the server's usage where given, else what was counted."""

    index: int
    timeline: Timeline
    input_tokens: int
    output_tokens: int
    asked_tokens: int
    cached_tokens: int | None = None
    exact_tokens: bool = False  # token_times_s has one entry per token
    finish_reason: str | None = None
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def interrupted(self) -> bool:
        return self.failure is not None and self.failure.kind == INTERRUPTED

    @property
    def ttft_s(self) -> float:
        """Time to first token from the scheduled arrival: waiting in the client for a slot counts."""
        return self.timeline.token_times_s[0] - self.timeline.scheduled_s

    @property
    def ttft_sent_s(self) -> float:
        """Time to first token from the moment of sending."""
        return self.timeline.token_times_s[0] - self.timeline.sent_s

    @property
    def e2e_s(self) -> float:
        """From the scheduled arrival to the end of the stream."""
        return self.timeline.ended_s - self.timeline.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for an answer of one token."""
        times = self.timeline.token_times_s
        if self.output_tokens < 2 or not times:
            return None
        return (times[-1] - times[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive tokens (chunks, where tokens were not named)."""
        times = self.timeline.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]
