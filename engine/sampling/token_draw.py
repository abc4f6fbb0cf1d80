"""From logits to drawn tokens: temperature, min_p, top_k, top_p, then the Gumbel-max trick.

    token = argmax over what the cuts keep of  logit / temperature + gumbel(draw's key, token id)

draws from the softmax exactly. It is preferred to inverting the cumulative distribution because there every rounding
error of every earlier token moves the border between two tokens; here an error of size e changes a draw with a
probability of order e. A request recomputed elsewhere, in another batch, has such errors and must draw the same tokens.

The key comes from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011): it is a function of (seed, sample, position) and of nothing else, so there is no state to carry along when
a request migrates, resumes or shares a batch. All keys of a step are made at once, in integer arithmetic, so every
machine gets the same bits.

Nothing is summed but the weights of top_p, and those are integers (2**44 for the best token): the same in every order,
so a row alone and a row in a batch are equal to the bit. Cuts are by value, so that ties do not depend on a sort:
tokens as likely as the last one kept stay too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.engine.request import SamplingParams
from kvbaton.kernels.draw import WEIGHT_BITS, gumbel

FIRST_GUESS = 256  # tokens in a nucleus; GROWTH times as many are looked at where they do not suffice
GROWTH = 16
CPU_SLICE = 1 << 18  # rows * vocab handled at a time: float64 temporaries that stay in a core's cache
GPU_SLICE = 1 << 23  # and that stay small beside the model

Words = npt.NDArray[np.uint64]  # 32-bit values in 64-bit lanes, so that products do not overflow

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MASK64 = (1 << 64) - 1


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Four random words a lane from a counter of four and a key of two; all arrays have one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _32) ^ c1 ^ k0, right & _LOW, (left >> _32) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def draw_keys(seeds: Seq[int], samples: Seq[int], positions: Seq[int]) -> npt.NDArray[np.uint64]:
    """64 random bits per (seed, sample index, sequence position)."""
    seed = np.array([value & _MASK64 for value in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    sample = np.array(samples, dtype=np.uint64)
    counter = (position & _LOW, position >> _32, sample & _LOW, sample >> _32)
    a, b, _, _ = philox4x32(counter, (seed & _LOW, seed >> _32))
    return a | (b << _32)


def draw_tokens(
    logits: torch.Tensor, params: Seq[SamplingParams], keys: npt.NDArray[np.uint64]
) -> torch.Tensor:  # [rows] int64
    """One token per row of logits [rows, vocab], all with temperature above 0; `keys[i]` is the randomness of row i."""
    step = max(1, (GPU_SLICE if logits.is_cuda else CPU_SLICE) // logits.shape[1])
    parts = []
    for at in range(0, logits.shape[0], step):
        part = slice(at, at + step)
        scores = kept_scores(logits[part], params[part])
        parts.append((scores + gumbel_noise(keys[part], scores.shape[1], logits.device)).argmax(-1))
    return torch.cat(parts)


def kept_scores(logits: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """Log of the unnormalised probabilities [rows, vocab] float64, 0 for the best token, -inf for what is cut."""
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / _column([p.temperature for p in params], logits.device)
    if any(p.min_p > 0.0 for p in params):
        scores.masked_fill_(torch.exp(scores) < _column([p.min_p for p in params], logits.device), -torch.inf)
    _cut_rows(scores, [row for row, p in enumerate(params) if 0 < p.top_k < logits.shape[1] or p.top_p < 1.0], params)
    return scores


def gumbel_noise(keys: npt.NDArray[np.uint64], vocab: int, device: torch.device) -> torch.Tensor:
    """[rows, vocab] float64: the standard Gumbel variable of each (key, token id).

    A key starts a SplitMix64 sequence (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
    whose numbers belong to the token ids in order.
    """
    return gumbel(torch.from_numpy(keys.view(np.int64)).to(device), vocab)


def keep_top_k(weights: torch.Tensor, top_k: Seq[int]) -> torch.Tensor:
    """Zero all but the k largest of each row of weights [rows, vocab]; k = 0 keeps all."""
    vocab = weights.shape[1]
    ks = [k if 0 < k < vocab else vocab for k in top_k]
    widest = max((k for k in ks if k < vocab), default=0)
    if not widest:
        return weights
    largest = weights.topk(widest, dim=-1).values
    last = torch.tensor([[min(k, widest) - 1] for k in ks], device=weights.device)
    least = largest.gather(1, last)
    least.masked_fill_(torch.tensor([[k == vocab] for k in ks], device=weights.device), 0)
    return weights * (weights >= least)


def keep_top_p(weights: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """Zero all but the smallest set of largest weights that has at least the share p of each row's sum."""
    if all(p >= 1.0 for p in top_p):
        return weights
    total = weights.sum(-1, keepdim=True)
    wanted = (_column(top_p, weights.device) * total.double()).ceil().long()  # [rows, 1]
    wanted = torch.minimum(wanted, total).clamp_(min=1)  # the product may round up past the total
    whole = torch.tensor([[p >= 1.0] for p in top_p], device=weights.device)
    largest = _largest(weights, wanted.masked_fill(whole, 0))
    last = (largest.cumsum(-1) < wanted).sum(-1, keepdim=True).clamp_(max=largest.shape[1] - 1)
    return weights * (weights >= largest.gather(1, last).masked_fill_(whole, 0))


def _largest(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The largest of each row of weights [rows, vocab], in order: enough of them to reach `wanted` [rows, 1]."""
    vocab = weights.shape[1]
    count = min(FIRST_GUESS, vocab)
    while True:
        largest = weights.topk(count, dim=-1).values
        if count == vocab or bool((largest.sum(-1, keepdim=True) >= wanted).all()):
            return largest
        count = min(count * GROWTH, vocab)


def _cut_rows(scores: torch.Tensor, rows: list[int], params: Seq[SamplingParams]) -> None:
    """Apply top_k, then top_p to what it leaves, to `rows` of scores [rows, vocab], in place."""
    if not rows:
        return
    chosen = scores[rows]
    weights = (torch.exp(chosen) * float(1 << WEIGHT_BITS)).long()
    weights = keep_top_k(weights, [params[row].top_k for row in rows])
    weights = keep_top_p(weights, [params[row].top_p for row in rows])
    scores[rows] = chosen.masked_fill_(weights == 0, -torch.inf)


def _column(values: Seq[float], device: torch.device) -> torch.Tensor:
    """[rows, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1).to(device)
