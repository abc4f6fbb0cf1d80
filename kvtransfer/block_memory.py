"""The memory that a hand-off reads and writes: numbered blocks of equal size. Knows bytes, not models."""

from __future__ import annotations

from typing import Any, Protocol


class BlockMemory(Protocol):
    """A KV pool seen as `num_blocks` contiguous byte ranges."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def block(self, block_id: int) -> Any:
        """The block as an object with a buffer (CPU) or `__cuda_array_interface__` (GPU); no copy."""
        ...
