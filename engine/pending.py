# mypy: allow-untyped-calls
"""A step that has been launched and has not landed: what will come of it, and what the next step reads of it meanwhile.

Its tokens exist on the device before the host knows them. `LaunchedStep` brings them to the host, `TokenFeed` to a step
that is launched before they are there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from kvbaton.engine.batch import SampledToken, ScheduledRow, StepResult
from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sampling.device_sampler import PendingTokens
from kvbaton.engine.sampling.sampler import Draw
from kvbaton.kernels.draw import DrawKernels

PromptLogprobs = tuple[TokenLogprobs | None, ...]


class Mark(Protocol):
    """A point in a device's queue of work."""

    def synchronize(self) -> None:
        """Blocks until the device has reached it."""
        ...


def mark_of(device: torch.device) -> Mark | None:
    """Behind everything that this thread has launched on `device`; None on the CPU, where a launch returns when it is
    done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`drawn` has a token for each sample of each row, or will have. `end` marks the end of the step on its device: the
    inner chunks of a prompt draw nothing that could be waited for, yet their blocks go to a peer once it has landed.
    """

    rows: list[ScheduledRow]
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
        at = 0
        tokens: list[tuple[SampledToken, ...]] = []
        redrawn = []
        for place, row in enumerate(self.rows):
            end = at + len(row.samples)
            tokens.append(tuple(sampled[at:end]))
            if not again.isdisjoint(range(at, end)):
                redrawn.append(place)
            at = end
        return StepResult(tokens, self.prompt_logprobs, tuple(redrawn))


class TokenFeed:
    """What the last step drew, by sequence, for the step behind it. Steps come in the order of their launches.

    known token                 its id
    token that is being drawn   -1 - i, where i is its place among the draws of the step before

    `fill` turns the second kind into ids on the device, from the tensor that the draws left there: the host waits for
    nothing. A draw that the device had to leave to the host stands there as -1; what is computed from it is thrown
    away, so any id will do.
    """

    def __init__(self, kernels: DrawKernels) -> None:
        self._kernels = kernels
        self._places: dict[int, int] = {}  # by the identity of a sequence, which lives while it is scheduled
        self._drawn: torch.Tensor | list[int] = []  # [draws] int64, on the device if it was drawn there

    def tokens(self, row: ScheduledRow) -> list[int]:
        """[row.num_tokens] ids, below zero for one that is being drawn. Raises `KeyError` where nobody draws it."""
        start = row.start
        known = row.seq.tokens[start : start + row.num_tokens]
        if len(known) == row.num_tokens:
            return known
        return [*known, -1 - self._places[id(row.seq)]]

    def fill(self, rows: Seq[ScheduledRow], token_ids: torch.Tensor) -> None:
        """Replace what is below zero in token_ids [n] int64, on the device, in place; they are those of `rows`."""
        if any(row.start + row.num_tokens > len(row.seq.tokens) for row in rows):
            self._kernels.fill_tokens(token_ids, torch.as_tensor(self._drawn, device=token_ids.device))

    def drew(self, draws: Seq[Draw], tokens: torch.Tensor | list[int]) -> None:
        """A step was launched whose draws are, or will be, `tokens` [len(draws)] int64."""
        self._places = {id(draw.seq): place for place, draw in enumerate(draws)}
        self._drawn = tokens
