# mypy: allow-untyped-calls
"""Sampling that never waits: the tokens of a step are drawn on the device, and the host asks for them once.

    start   parameters of the rows up (one copy), top, cuts, draw, tokens down (one copy), an event behind them
    wait    the host waits for the event: the only place in a step where it does

It serves what almost every request asks for: greedy, and temperature with top_k, top_p and min_p. Rows with penalties,
biases or log-probabilities take the `sampler`'s way, which waits more often. The draws are the same to the bit as the
sampler's where `exp` and `log` are.

A cut looks at the `HORIZON` most likely tokens of a row. A row whose nucleus reaches further draws -1, and is
drawn again by the sampler when the tokens have arrived. A step that was launched on top of it has read a wrong id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from kvbaton.engine.request import SamplingParams
from kvbaton.engine.sampling.logit_edits import needs_edits
from kvbaton.engine.sampling.sampler import LEAST_TEMPERATURE, Draw, sample_tokens
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.backend import draw_kernels_for
from kvbaton.kernels.draw import WEIGHT_BITS, DrawKernels, DrawRows

HORIZON = 1024
TOO_WIDE = -1  # of a row whose cut lies beyond the horizon
_ALIGNED_ROWS = 16  # a parameter's column begins at a multiple of this many rows, which the kernels load best


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Each [rows], on the device; `top_k` 0 and `top_p` 1 where a row has none."""

    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float64


@dataclass(frozen=True, slots=True)
class _Again:
    """What it takes to draw rows of `logits` [rows, vocab] a second time, when their sequences may have grown."""

    logits: torch.Tensor
    draws: list[Draw]
    positions: list[int]

    def draw(self, rows: list[int]) -> list[int]:
        draws = []
        for place, i in enumerate(rows):
            draw = self.draws[i]
            draws.append(replace(draw, row=place, ahead=self.positions[i] - len(draw.seq.tokens)))
        return [drawn.token_id for drawn in sample_tokens(self.logits[rows], draws)]


class PendingTokens:
    """Tokens on their way to the host. `tokens` [rows] int64 is what the device drew, -1 where it could not."""

    def __init__(self, tokens: torch.Tensor, again: _Again | None = None) -> None:
        """Starts the copy of `tokens`; none of them is -1 where there is nothing to draw `again` from."""
        self.tokens = tokens
        self.redrawn: list[int] = []  # after `wait`: rows that were drawn again
        self._again = again
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tokens

    def wait(self) -> list[int]:
        """One token per draw. Blocks until the device has drawn them."""
        if self._event is not None:
            self._event.synchronize()
        chosen: list[int] = self._host.tolist()
        if self._again is not None:
            self.redrawn = [i for i, token in enumerate(chosen) if token == TOO_WIDE]
        if self._again is not None and self.redrawn:
            for i, token in zip(self.redrawn, self._again.draw(self.redrawn), strict=True):
                chosen[i] = token
        return chosen


class DeviceSampler:
    """Has no state beside its kernels."""

    def __init__(self, device: torch.device, kernels: DrawKernels | None = None) -> None:
        self._device = device
        self._kernels = kernels or draw_kernels_for(device)

    def takes(self, draws: list[Draw]) -> bool:
        """Whether every draw has a row to itself, in order, and asks only for what is served here."""
        return all(draw.row == i and is_plain(draw.seq) for i, draw in enumerate(draws))

    def start(self, logits: torch.Tensor, draws: list[Draw]) -> PendingTokens:
        """Draw one token from each row of logits [rows, vocab] float32; `takes(draws)` must hold."""
        params = [draw.seq.sampling for draw in draws]
        if not any(_is_random(p) for p in params):
            return PendingTokens(self._kernels.argmax(logits))
        rows, cuts = _upload(draws, self._device)
        top = logits.amax(-1)
        if not any(_has_cut(p, logits.shape[1]) for p in params):
            return PendingTokens(self._kernels.draw(logits, top, rows, False))
        rows, reached = self._with_cuts(logits, top, rows, cuts)
        tokens = torch.where(reached, self._kernels.draw(logits, top, rows, True), TOO_WIDE)
        kept = logits if logits.is_cuda else logits.clone()  # on the CPU the next step reuses the memory
        return PendingTokens(tokens, _Again(kept, draws, [draw.position for draw in draws]))

    def _with_cuts(
        self, logits: torch.Tensor, top: torch.Tensor, rows: DrawRows, cuts: _Cuts
    ) -> tuple[DrawRows, torch.Tensor]:
        """`rows` with the least weight that top_k, then top_p keep; and whether the horizon reached it, [rows] bool."""
        width = min(HORIZON, logits.shape[1])
        whole = width == logits.shape[1]
        weights = _weights(logits.topk(width, dim=-1).values, top, rows)  # [rows, width], largest first
        has_k = (cuts.top_k > 0) & (cuts.top_k < logits.shape[1])
        has_p = cuts.top_p < 1.0
        kth = weights.gather(1, (cuts.top_k - 1).clamp(0, width - 1).unsqueeze(1)).squeeze(1)
        least = torch.where(has_k, kth, 0)
        # Tokens as likely as the k-th stay too; none of them may lie past the horizon.
        reached = ~has_k | whole | (weights[:, -1] < least.clamp(min=1))
        kept = weights.masked_fill(weights < least.unsqueeze(1), 0)
        total = torch.where(has_k, kept.sum(-1), self._kernels.total_weight(logits, top, rows))
        wanted = torch.minimum((cuts.top_p * total.double()).ceil().long(), total).clamp(min=1)
        sums = kept.cumsum(-1)
        last = (sums < wanted.unsqueeze(1)).sum(-1, keepdim=True).clamp(max=width - 1)
        least = torch.where(has_p, kept.gather(1, last).squeeze(1), least)
        reached &= ~has_p | (sums[:, -1] >= wanted)
        least = torch.where(has_k | has_p, least.clamp(min=1), 0)
        return replace(rows, least=least), reached


def is_plain(seq: Sequence) -> bool:
    """Whether the host has no part in the next token of `seq`, nor in those after it."""
    return seq.sampling.logprobs is None and not needs_edits(seq)


def _is_random(params: SamplingParams) -> bool:
    return params.temperature >= LEAST_TEMPERATURE


def _has_cut(params: SamplingParams, vocab: int) -> bool:
    return _is_random(params) and (0 < params.top_k < vocab or params.top_p < 1.0 or params.min_p > 0.0)


def _upload(draws: list[Draw], device: torch.device) -> tuple[DrawRows, _Cuts]:
    """All parameters in one buffer and one copy; greedy rows have temperature 0 and no cuts."""
    count = len(draws)
    stride = -(-count // _ALIGNED_ROWS) * _ALIGNED_ROWS
    whole = np.zeros((5, stride), dtype=np.int64)
    real = np.zeros((3, stride), dtype=np.float64)
    for i, draw in enumerate(draws):
        p = draw.seq.sampling
        if _is_random(p):
            whole[:4, i] = p.seed, draw.sample, draw.position, p.top_k
            real[:, i] = p.temperature, p.min_p, p.top_p
        else:
            real[2, i] = 1.0
    host = torch.from_numpy(np.concatenate((whole, real.view(np.int64))))
    sent = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
    seeds, samples, positions, top_k, least = sent[:5, :count]
    temperature, min_p, top_p = sent[5:].view(torch.float64)[:, :count]
    return DrawRows(seeds, samples, positions, temperature, min_p, least), _Cuts(top_k, top_p)


def _weights(logits: torch.Tensor, top: torch.Tensor, rows: DrawRows) -> torch.Tensor:
    """logits [rows, n] -> int64 like it: what min_p keeps as the kernels weigh it, 0 for the rest."""
    heat = torch.where(rows.temperature > 0, rows.temperature, 1.0).unsqueeze(1)
    likely = torch.exp((logits.double() - top.double().unsqueeze(1)) / heat)
    return (likely * float(1 << WEIGHT_BITS)).long().masked_fill(likely < rows.min_p.unsqueeze(1), 0)
