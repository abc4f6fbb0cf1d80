"""Which blocks of the pool are being written by which hand-off: no block ever has two writers."""

from __future__ import annotations

from kvbaton.kvtransfer.messages import HandoffKey


class LandingBlocks:
    """Claims are all or nothing and end with the hand-off."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._claimed: dict[HandoffKey, tuple[int, ...]] = {}
        self._owned: set[int] = set()

    def claim(self, key: HandoffKey, block_ids: tuple[int, ...]) -> str:
        """Claim the blocks for `key`; returns why that is impossible, or an empty string."""
        wanted = set(block_ids)
        if len(wanted) != len(block_ids):
            return "a block is listed twice"
        if any(not 0 <= b < self._num_blocks for b in wanted):
            return f"block ids outside the pool of {self._num_blocks}"
        if taken := wanted & self._owned:
            return f"block {min(taken)} is landing for another hand-off"
        self._claimed[key] = block_ids
        self._owned |= wanted
        return ""

    def release(self, key: HandoffKey) -> None:
        self._owned.difference_update(self._claimed.pop(key, ()))

    def __len__(self) -> int:
        return len(self._owned)
