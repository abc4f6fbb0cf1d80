"""The KV pool's memory: one tensor, block outermost, so that a block is one contiguous range over all layers.

    pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]      K at index 0, V at 1

The hand-off sees the same bytes as numbered blocks (`num_blocks`, `block_bytes`, `block(i)`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvbaton.kernels.host_memory import zeroed_memory

KV_LAYOUT_VERSION = 1  # of the order of axes above; engines of different versions refuse each other


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """What one block is made of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """K and V of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes


class KVCache:
    """The pool tensor and its view as numbered byte ranges; satisfies kvtransfer's `BlockMemory`.

    `pool` may have scratch blocks behind the `num_blocks` numbered ones. Nobody can hold or send them: they
    absorb what the rows that pad a batch write.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int, device: torch.device, scratch_blocks: int = 0) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.block_bytes = geometry.block_bytes
        total = num_blocks + scratch_blocks
        flat = _zeros(total * self.block_bytes, device)
        self.pool = flat.view(geometry.dtype).view(total, *geometry.block_shape)
        rows = flat.view(total, self.block_bytes)  # [num_blocks + scratch_blocks, block_bytes] uint8
        self._rows: Any = rows if device.type == "cuda" else rows.numpy()

    def block(self, block_id: int) -> Any:
        """Block `block_id` as [block_bytes] uint8, no copy: a numpy array (CPU) or a CUDA tensor."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} does not exist in a pool of {self.num_blocks}")
        return self._rows[block_id]


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8, zero: a kernel that reads past a context and masks the result must not meet a NaN.

    On the CPU the pages are the operating system's zero pages, so an unused part of the pool costs no memory and no
    start-up time, and blocks are page-aligned where their size allows.
    """
    if device.type == "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return zeroed_memory(num_bytes)
