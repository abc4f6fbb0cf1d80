"""Products with 8-bit weights through the C interface of a native library, beside those with plain weights."""

from __future__ import annotations

import ctypes

import torch

from kvbaton.kernels.native_lib import DTYPE_CODES

PANEL = 32


class Int8Products:
    """One library, with a team of threads of its own."""

    def __init__(self, library: ctypes.CDLL, threads: int = 1) -> None:
        self._library = library
        self._team = library.team_make(threads)

    def close(self) -> None:
        self._library.team_free(self._team)

    def int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Kernels.linear_int8`."""
        code, (out, inputs) = DTYPE_CODES[x.dtype], weight.shape
        packed = torch.full((self._library.kvb_packed_int8_bytes(code, out, inputs),), 85, dtype=torch.uint8)
        self._library.kvb_pack_int8(code, weight.contiguous().data_ptr(), packed.data_ptr(), out, inputs, 0)
        return self._product(x, packed, out, columns(scale), None if bias is None else columns(bias))

    def plain(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times weight [out, in] of the same dtype -> [rows, out]."""
        code, (out, inputs) = DTYPE_CODES[x.dtype], weight.shape
        packed = torch.zeros(self._library.kvb_packed_bytes(code, out, inputs), dtype=torch.uint8)
        self._library.kvb_pack(code, weight.contiguous().data_ptr(), packed.data_ptr(), out, inputs, 0)
        return self._product(x, packed, out, None, None)

    def _product(
        self, x: torch.Tensor, packed: torch.Tensor, out: int, scale: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows, inputs = x.shape
        y = torch.full((rows, out), float("nan"), dtype=x.dtype)
        work = torch.empty(rows * inputs, dtype=torch.float32)
        pointers = [None if t is None else t.data_ptr() for t in (x, packed, scale, bias, y)]
        self._library.kvb_linear_int8(self._team, DTYPE_CODES[x.dtype], *pointers, rows, inputs, out, work.data_ptr())
        return y


def columns(values: torch.Tensor) -> torch.Tensor:
    """values [out] as float32, padded to whole panels with what must never be seen."""
    missing = -len(values) % PANEL
    return torch.nn.functional.pad(values.float(), (0, missing), value=float("nan"))
