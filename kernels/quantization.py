"""How K and V are stored: in the model's own dtype, or as 8-bit floats (e4m3) at half the memory and half the reads.

e4m3 has 3 bits of mantissa and no infinity; 448 is its largest value. The scale is 1 for every tensor: K after its norm
or rotation and V lie within a few hundred at most, a float's relative error does not depend on its scale, and a block
then means the same on every engine without a table that travels beside it. What is larger saturates.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def to_kv(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the pool's dtype; torch's own cast makes NaN of what e4m3 cannot hold."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype is FP8 else x.to(dtype)


def storage(x: torch.Tensor) -> torch.Tensor:
    """`x`, 8-bit floats as the bytes that they are: indexing them is not defined on every device."""
    return x.view(torch.uint8) if x.dtype is FP8 else x
