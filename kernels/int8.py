"""Weights as 8-bit integers: symmetric, one scale an output channel, round to nearest even.

    scale[o] = max |w[o]| / 127        weight[o] = round(w[o] / scale[o])        w[o] ~ weight[o] * scale[o]

So every value is off by at most half a scale, and a row of zeros stays zero. The same on every device to the last bit.
"""

from __future__ import annotations

import torch

LARGEST = 127
_CHUNK_ELEMENTS = 1 << 22  # of the source as float32 at a time


def quantize_into(source: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """source [out, in], any float dtype or device -> weight [out, in] int8 and scale [out] float32, written in place.

    Raises ValueError where `source` holds NaN or infinity.
    """
    rows = max(1, _CHUNK_ELEMENTS // source.shape[1])
    for start in range(0, source.shape[0], rows):
        part = source[start : start + rows].to(weight.device, torch.float32)
        peak = part.abs().amax(dim=1)
        # a tensor, for CUDA multiplies with the reciprocal of a number, which rounds differently
        unit = peak / torch.full_like(peak, LARGEST)
        if not bool(unit.isfinite().all()):
            raise ValueError("holds values that are not finite")
        divisor = torch.where(unit > 0, unit, 1.0)
        quotient = (part / divisor.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
        weight[start : start + rows] = quotient.to(torch.int8)
        scale[start : start + rows] = unit
