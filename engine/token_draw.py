"""From logits to drawn tokens: temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution.

Probabilities become integers (weight 2**44 for the most likely token) before anything is summed. Integer sums are the
same in every order, so a draw does not depend on which kernel a batch size selects, on the device, or on neighbours.
Cuts are by value, so that ties never depend on the order of a sort: tokens as likely as the last one kept stay too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.engine.request import SamplingParams

WEIGHT_BITS = 44  # 2**44 a token, up to 2**18 tokens: sums stay below 2**62
FIRST_GUESS = 256  # a nucleus is rarely larger; sorting the whole vocabulary is the slow way


def draw_tokens(
    logits: torch.Tensor, params: Seq[SamplingParams], uniforms: npt.NDArray[np.float64]
) -> torch.Tensor:  # [rows] int64
    """One token a row of logits [rows, vocab], all with temperature above 0, by one uniform number in [0, 1) each."""
    weights = token_weights(logits, params)
    weights = keep_top_k(weights, [p.top_k for p in params])
    weights = keep_top_p(weights, [p.top_p for p in params])
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    at = (_column(uniforms, logits.device) * total.double()).long()
    at = torch.minimum(at, total - 1)  # the product may round up to the total
    return torch.searchsorted(cumulative, at, right=True).squeeze(1)


def token_weights(logits: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """Integer weights [rows, vocab] proportional to the probabilities, 2**44 for the best; 0 below `min_p`."""
    shifted = logits.double()
    shifted = shifted - shifted.amax(-1, keepdim=True)
    relative = torch.exp(shifted / _column([p.temperature for p in params], logits.device))
    if any(p.min_p > 0.0 for p in params):
        relative = relative * (relative >= _column([p.min_p for p in params], logits.device))
    return (relative * float(1 << WEIGHT_BITS)).long()


def keep_top_k(weights: torch.Tensor, top_k: Seq[int]) -> torch.Tensor:
    """Zero all but the k largest of each row of weights [rows, vocab]; k = 0 keeps all."""
    vocab = weights.shape[1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab]
    if not rows:
        return weights
    ks = torch.tensor([[top_k[row]] for row in rows], device=weights.device)
    chosen = weights[rows]
    largest = chosen.topk(max(top_k[row] for row in rows), dim=-1).values
    return _cut(weights, rows, chosen, largest.gather(1, ks - 1))


def keep_top_p(weights: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """Zero all but the smallest set of largest weights that has at least the share p of each row's sum."""
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return weights
    chosen = weights[rows]
    share = _column([top_p[row] for row in rows], weights.device)
    wanted = (share * chosen.sum(-1, keepdim=True).double()).ceil().long().clamp_(min=1)  # [rows, 1]
    guess = min(FIRST_GUESS, chosen.shape[1])
    largest = chosen.topk(guess, dim=-1).values
    if bool((largest.sum(-1, keepdim=True) < wanted).any()):
        largest = chosen.sort(-1, descending=True).values
    last = (largest.cumsum(-1) < wanted).sum(-1, keepdim=True).clamp_(max=largest.shape[1] - 1)
    return _cut(weights, rows, chosen, largest.gather(1, last))


def _cut(weights: torch.Tensor, rows: list[int], chosen: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Rows `rows` of weights replaced by `chosen` [len(rows), vocab] without what is below `least` [len(rows), 1]."""
    kept = chosen * (chosen >= least)
    if len(rows) == weights.shape[0]:
        return kept
    weights = weights.clone()
    weights[rows] = kept
    return weights


def _column(values: Seq[float] | npt.NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """[rows, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1).to(device)
