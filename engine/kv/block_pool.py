"""Which KV blocks are free and how many holders each of the others has. Numbers only: no memory, no hashes.

    FREE --take--> HELD (n >= 1 holders) --last drop--> IDLE --give_back--> FREE
                     ^-----------------hold----------------'

An IDLE block has no holder but still has contents that somebody (the prefix cache) may want; its owner decides whether
it is held again or given back. Every operation is O(1); freed blocks are reused first in, first out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


class OutOfBlocks(RuntimeError):
    """A request for more blocks than there are; nothing was taken."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed} KV blocks needed, {available} available")
        self.needed = needed
        self.available = available


class BlockMisuse(RuntimeError):
    """A block was released twice, used while free, or does not exist: its owner has lost count."""


class BlockPool:
    """Free list and holder counts of `num_blocks` blocks, numbered from 0."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._holders = [0] * num_blocks
        self._num_held = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self._num_held

    def holders(self, block_id: int) -> int:
        """How many hold the block; 0 for a free or idle one."""
        self._known(block_id)
        return self._holders[block_id]

    def free_blocks(self) -> Iterator[int]:
        """Free blocks in the order in which they will be taken."""
        return iter(self._free)

    def take(self) -> int:
        """The free block that has been free for longest, with one holder. Raises `OutOfBlocks`."""
        if not self._free:
            raise OutOfBlocks(1, 0)
        block_id = self._free.popleft()
        self._is_free[block_id] = 0
        self._holders[block_id] = 1
        self._num_held += 1
        return block_id

    def hold(self, block_id: int) -> bool:
        """Add a holder; True if it is the first. The block must not be free."""
        self._in_use(block_id)
        self._holders[block_id] += 1
        first = self._holders[block_id] == 1
        self._num_held += first
        return first

    def drop(self, block_id: int) -> bool:
        """Remove a holder; True if it was the last, which leaves the block idle."""
        self._in_use(block_id)
        if not self._holders[block_id]:
            raise BlockMisuse(f"block {block_id} is released but nobody holds it")
        self._holders[block_id] -= 1
        last = not self._holders[block_id]
        self._num_held -= last
        return last

    def give_back(self, block_id: int) -> None:
        """An idle block becomes the last in the free list."""
        self._in_use(block_id)
        if self._holders[block_id]:
            raise BlockMisuse(f"block {block_id} is freed but has {self._holders[block_id]} holders")
        self._is_free[block_id] = 1
        self._free.append(block_id)

    def is_free(self, block_id: int) -> bool:
        self._known(block_id)
        return bool(self._is_free[block_id])

    def _in_use(self, block_id: int) -> None:
        self._known(block_id)
        if self._is_free[block_id]:
            raise BlockMisuse(f"block {block_id} is free: released twice, or used after its release")

    def _known(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise BlockMisuse(f"block {block_id} does not exist in a pool of {self.num_blocks}")
