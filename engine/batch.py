"""What a scheduler hands to the engine for one step, and what it gets back. No padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Run `seq.tokens[num_computed : num_computed + num_tokens]` of one sequence.

    `samples` are the sample indices to draw from the logits of the last of these tokens: one for a decode row, all of
    the request's for the last chunk of a prompt, none for an inner chunk. The sequence's block table already covers
    the new tokens, and every block written here has exactly one holder.
    """

    seq: Sequence
    num_tokens: int
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled row, in order: a sampled token per entry of `row.samples`; and, for rows of a request with
    `prompt_logprobs`, that *token's own* log-probability for each token of the row (None for position 0)."""

    sampled: list[tuple[SampledToken, ...]]
    prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None]
