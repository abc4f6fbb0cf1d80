"""The index of the largest logit of each row, as `Tensor.argmax` gives it, at the speed of memory on the CPU."""

from __future__ import annotations

import torch

from kvbaton.kernels.native_lib import native_library


def best_tokens(logits: torch.Tensor) -> torch.Tensor:  # [rows] int64
    """The first index of the largest value of each row of logits [rows, vocab]; a NaN counts as the largest."""
    library = native_library() if logits.device.type == "cpu" and logits.dtype is torch.float32 else None
    if library is None:
        return logits.argmax(-1)
    values = logits.contiguous()
    best = torch.empty(values.shape[0], dtype=torch.int64)
    library.kvb_argmax(values.data_ptr(), values.shape[0], values.shape[1], best.data_ptr())
    return best
