"""ucxx's views of a memory's blocks, made once each: a view costs more than the call that uses it."""

from __future__ import annotations

from typing import Any

from kvbaton.kvtransfer.block_memory import BlockMemory
from kvbaton.kvtransfer.ucx_library import array_of


class BlockArrays:
    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory
        self._arrays: dict[int, Any] = {}
        self.empty = array_of(bytearray())

    def of(self, block_id: int) -> Any:
        array = self._arrays.get(block_id)
        if array is None:
            array = self._arrays[block_id] = array_of(self._memory.block(block_id))
        return array
