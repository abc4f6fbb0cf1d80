"""A step that has been launched, from the launch to its tokens on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbaton.engine.batch import SampledToken, ScheduledRow, StepResult
from kvbaton.engine.device_sampler import PendingTokens
from kvbaton.engine.request import TokenLogprobs

PromptLogprobs = tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`rows` in the order in which they were computed, the one that ran as k-th was scheduled as `order[k]`-th.
    `drawn` has a token for each sample of each row, or will have."""

    rows: list[ScheduledRow]
    order: list[int]
    drawn: PendingTokens | list[SampledToken]
    prompt_logprobs: list[PromptLogprobs | None]

    @torch.inference_mode()
    def wait(self) -> StepResult:
        """Blocks until the tokens are here. Once."""
        drawn, again = self.drawn, set[int]()
        if isinstance(drawn, PendingTokens):
            sampled = [SampledToken(token_id) for token_id in drawn.wait()]
            again = set(drawn.redrawn)
        else:
            sampled = drawn
        count, at = len(self.rows), 0
        tokens: list[tuple[SampledToken, ...]] = [()] * count
        prompt_logprobs: list[PromptLogprobs | None] = [None] * count
        redrawn = []
        for row, place, logprobs in zip(self.rows, self.order, self.prompt_logprobs, strict=True):
            end = at + len(row.samples)
            tokens[place] = tuple(sampled[at:end])
            prompt_logprobs[place] = logprobs
            if not again.isdisjoint(range(at, end)):
                redrawn.append(place)
            at = end
        return StepResult(tokens, prompt_logprobs, tuple(redrawn))
