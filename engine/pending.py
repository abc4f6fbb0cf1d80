# mypy: allow-untyped-calls
"""A step that has been launched, from the launch to its tokens on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvbaton.engine.batch import SampledToken, ScheduledRow, StepResult
from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sampling.device_sampler import PendingTokens

PromptLogprobs = tuple[TokenLogprobs | None, ...]


class Mark(Protocol):
    """A place in what a device has to do."""

    def synchronize(self) -> None:
        """Blocks until the device has come there."""
        ...


def mark_of(device: torch.device) -> Mark | None:
    """Behind everything that this thread has launched on `device`; None where launching is doing."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`rows` in the order in which they were computed, the one that ran as k-th was scheduled as `order[k]`-th.
    `drawn` has a token for each sample of each row, or will have. `end` is behind the step on its device: inner chunks
    of prompts draw nothing that could be waited for, and their blocks are sent to a peer when the step has landed."""

    rows: list[ScheduledRow]
    order: list[int]
    drawn: PendingTokens | list[SampledToken]
    prompt_logprobs: list[PromptLogprobs | None]
    end: Mark | None = None

    @torch.inference_mode()
    def wait(self) -> StepResult:
        """Blocks until the tokens are here, and K and V in the pool. Once."""
        drawn, again = self.drawn, set[int]()
        if self.end is not None:
            self.end.synchronize()
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
