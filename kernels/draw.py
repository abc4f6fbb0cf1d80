"""What the drawing of one step's tokens needs on the device, and the plain torch form of it: the specification.

    keys      Philox4x32-10 of (seed, sample, position)
    score     (logit - best logit) / temperature, float64
    weight    floor(2**44 * exp(score)): integers, whose sums do not depend on their order
    token     argmax over weight >= least of  score + gumbel(key, token id); the lowest id among equals

Rows of temperature 0 are greedy: argmax of the logits. The same bits come out on every device; only `exp` and `log` in
float64 may differ in their last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvbaton.kernels.native_lib import native_library

WEIGHT_BITS = 44  # up to 2**18 tokens: sums stay below 2**62
_ROUNDS = 10
_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class DrawRows:
    """Each [rows], on the device. `least` is the smallest weight that a cut keeps, 0 where nothing is cut."""

    seeds: torch.Tensor  # int64
    samples: torch.Tensor  # int64
    positions: torch.Tensor  # int64
    temperature: torch.Tensor  # float64, 0 for greedy rows
    min_p: torch.Tensor  # float64
    least: torch.Tensor  # int64


class DrawKernels(Protocol):
    """Passes over the logits [rows, vocab] float32; `top` [rows] float32 is each row's largest one."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows] int64: what `draw` gives where every row is greedy."""
        ...

    def draw(self, logits: torch.Tensor, top: torch.Tensor, rows: DrawRows, cuts: bool) -> torch.Tensor:
        """[rows] int64. `cuts` False: no row has one; less is computed."""
        ...

    def total_weight(self, logits: torch.Tensor, top: torch.Tensor, rows: DrawRows) -> torch.Tensor:
        """[rows] int64: the sum of weights of the tokens that min_p keeps."""
        ...

    def fill_tokens(self, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
        """token_ids [n] int64, in place: -1 - i becomes drawn[i] of drawn [m] int64, 0 where that is below zero too."""
        ...


class TorchDraw:
    """Plain torch, on any device. Holds several float64 tensors of the logits' size at a time."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def draw(self, logits: torch.Tensor, top: torch.Tensor, rows: DrawRows, cuts: bool) -> torch.Tensor:
        noisy = rows.temperature > 0
        scores = _scores(logits, top, rows)
        noise = gumbel(philox_keys(rows), logits.shape[1])
        values = scores + torch.where(noisy.unsqueeze(1), noise, 0.0)
        if cuts:
            kept = (_weights(scores) >= rows.least.unsqueeze(1)) & (scores.exp() >= rows.min_p.unsqueeze(1))
            values = values.masked_fill(~kept, -torch.inf)
        return values.argmax(-1)

    def total_weight(self, logits: torch.Tensor, top: torch.Tensor, rows: DrawRows) -> torch.Tensor:
        scores = _scores(logits, top, rows)
        return _weights(scores).masked_fill(scores.exp() < rows.min_p.unsqueeze(1), 0).sum(-1)

    def fill_tokens(self, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
        taken = drawn[(-1 - token_ids).clamp(min=0)].clamp(min=0)
        token_ids.copy_(torch.where(token_ids < 0, taken, token_ids))


def best_tokens(logits: torch.Tensor) -> torch.Tensor:  # [rows] int64
    """As `Tensor.argmax` over each row of logits [rows, vocab], at the speed of memory on the CPU too."""
    library = native_library() if logits.device.type == "cpu" and logits.dtype is torch.float32 else None
    if library is None:
        return logits.argmax(-1)
    values = logits.contiguous()
    best = torch.empty(values.shape[0], dtype=torch.int64)
    library.kvb_argmax(values.data_ptr(), values.shape[0], values.shape[1], best.data_ptr())
    return best


def philox_keys(rows: DrawRows) -> torch.Tensor:
    """[rows] int64 with the 64 bits of each (seed, sample, position): two words of Philox4x32-10."""
    c = [rows.positions & _LOW, _shifted(rows.positions, 32), rows.samples & _LOW, _shifted(rows.samples, 32)]
    k0, k1 = rows.seeds & _LOW, _shifted(rows.seeds, 32)
    for _ in range(_ROUNDS):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [_shifted(right, 32) ^ c[1] ^ k0, right & _LOW, _shifted(left, 32) ^ c[3] ^ k1, left & _LOW]
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c[0] | (c[1] << 32)


def gumbel(keys: torch.Tensor, vocab: int) -> torch.Tensor:
    """[rows, vocab] float64 from keys [rows]: a SplitMix64 sequence a key, one number a token id."""
    tokens = torch.arange(1, vocab + 1, device=keys.device)
    z = keys.unsqueeze(1) + tokens * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    uniform = (_shifted(z, 12).double() + 0.5) * 2.0**-52  # in (0, 1), never either end
    return uniform.log_().neg_().log_().neg_()


def _scores(logits: torch.Tensor, top: torch.Tensor, rows: DrawRows) -> torch.Tensor:  # [rows, vocab] float64
    heat = torch.where(rows.temperature > 0, rows.temperature, 1.0)
    return (logits.double() - top.double().unsqueeze(1)) / heat.unsqueeze(1)


def _weights(scores: torch.Tensor) -> torch.Tensor:
    return (scores.exp() * float(1 << WEIGHT_BITS)).long()


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit constant whose top bit is set; products wrap to the same bits."""
    return value - (1 << 64)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 bits; torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
