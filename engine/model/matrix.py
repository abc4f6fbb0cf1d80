"""A matrix of the model: a plain tensor, or 8-bit integers with a scale for each row.

Both are filled by `copy_` and cut into rows by `row_parts`, so loading need not know which it fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbaton.kernels.quantization import quantize_into


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """Row o stands for weight[o] * scale[o]; see `kernels.quantization`."""

    weight: torch.Tensor  # [out, in] int8
    scale: torch.Tensor  # [out] float32

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Int8Matrix:
        """Uninitialised."""
        weight = torch.empty(rows, columns, dtype=torch.int8, device=device)
        return cls(weight, torch.empty(rows, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize source [out, in] into this; raises ValueError for values that are not finite."""
        quantize_into(source, self.weight, self.scale)


Matrix = torch.Tensor | Int8Matrix


def plain(matrix: Matrix) -> torch.Tensor:
    """The tensor of a matrix that is none of integers; raises ValueError for one that is."""
    if isinstance(matrix, Int8Matrix):
        raise ValueError("the matrix is quantized: this needs the model's own weights")
    return matrix


def row_parts(matrix: Matrix, sizes: Sequence[int]) -> list[Matrix]:
    """Views of `sizes` rows each, in order."""
    if isinstance(matrix, Int8Matrix):
        parts = zip(torch.split(matrix.weight, list(sizes)), torch.split(matrix.scale, list(sizes)), strict=True)
        return [Int8Matrix(weight, scale) for weight, scale in parts]
    return list(torch.split(matrix, list(sizes)))
