"""What a scheduler hands to the engine for one step, and what it gets back. No padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Run the next `num_tokens` tokens of one sequence, from `start` on.

    `ahead` tokens before them belong to a step that has been launched and has not landed: what it computes is not in
    `seq.num_computed` yet, and the token that it draws for a decode row is not in `seq.tokens`.

    `samples` are the sample indices to draw from the logits of the last of these tokens: one for a decode row, all of
    the request's for the last chunk of a prompt, none for an inner chunk. The sequence's block table already covers
    the new tokens, and every block written here has exactly one holder.
    """

    seq: Sequence
    num_tokens: int
    samples: tuple[int, ...]
    ahead: int = 0

    @property
    def start(self) -> int:
        """Position of the row's first token; true until the step before it lands."""
        return self.seq.num_computed + self.ahead


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled row, in order: a sampled token per entry of `row.samples`; and, for rows of a request with
    `prompt_logprobs`, that *token's own* log-probability for each token of the row (None for position 0).

    `redrawn` are rows whose token was drawn on the host at the end: a row of the next step that was launched before
    read something else in its place, and nothing of it may be used."""

    sampled: list[tuple[SampledToken, ...]]
    prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None]
    redrawn: tuple[int, ...] = ()


class Pending(Protocol):
    """A step on its way."""

    def wait(self) -> StepResult:
        """Blocks until the device is through with it. Called once, in the order of launches."""
        ...
