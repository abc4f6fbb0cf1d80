"""Numbers held in 8 bits: weights as integers, K and V as floats.

Weights: symmetric, one scale an output channel, round to nearest even.

    scale[o] = max |w[o]| / 127        weight[o] = round(w[o] / scale[o])        w[o] ~ weight[o] * scale[o]

So every value is off by at most half a scale, and a row of zeros stays zero. Every device gives the same bits.

K and V are e4m3 floats, where they are not in the model's own dtype: half the memory and half the reads of bfloat16.
e4m3 has 3 bits of mantissa and no infinity; 448 is its largest value. The scale is 1 for every tensor: K after its norm
or rotation and V lie within a few hundred at most, a float's relative error does not depend on its scale, and a block
then means the same on every engine without a table that travels beside it. What is larger saturates.
"""

from __future__ import annotations

import torch

LARGEST = 127
_CHUNK_ELEMENTS = 1 << 22  # of the source as float32 at a time
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize_into(source: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """source [out, in], any float dtype or device -> weight [out, in] int8 and scale [out] float32, written in place.

    Raises ValueError where `source` holds NaN or infinity.
    """
    rows = max(1, _CHUNK_ELEMENTS // source.shape[1])
    for start in range(0, source.shape[0], rows):
        part = source[start : start + rows].to(weight.device, torch.float32)
        peak = part.abs().amax(dim=1)
        # divided by a tensor: CUDA multiplies by the reciprocal of a plain number, which rounds differently
        unit = peak / torch.full_like(peak, LARGEST)
        if not bool(unit.isfinite().all()):
            raise ValueError("holds values that are not finite")
        divisor = torch.where(unit > 0, unit, 1.0)
        quotient = (part / divisor.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
        weight[start : start + rows] = quotient.to(torch.int8)
        scale[start : start + rows] = unit


def to_kv(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the pool's dtype; torch's own cast makes NaN of what e4m3 cannot hold."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype is FP8 else x.to(dtype)


def storage(x: torch.Tensor) -> torch.Tensor:
    """`x`, 8-bit floats as the bytes that they are: indexing them is not defined on every device."""
    return x.view(torch.uint8) if x.dtype is FP8 else x
