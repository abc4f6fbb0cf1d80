"""Token ids of a step whose newest ones only the device knows, because the step before it has not landed.

    known token                 its id
    token that is being drawn   -1 - i, where i is its place among the draws of the step before

`fill` turns the second kind into ids on the device, from the tensor that the draws left there: the host waits for
nothing. A draw that the device had to leave to the host stands there as -1; what is computed from it is thrown away, so
any id will do.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.sampling.sampler import Draw
from kvbaton.kernels.draw import DrawKernels


class TokenFeed:
    """What the last step drew, by sequence. Steps come in the order of their launches."""

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
