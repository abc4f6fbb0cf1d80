"""Which engine holds which prompt blocks, as far as an ingress knows.

Two sources: the engines' numbered stored/evicted events, and the router's own recent placements, which count at once
and for a short time, so that siblings of one prompt meet on one engine before its first event arrives. A block hash
chains its parent, so the longest held run of a prompt's hashes is the cached prefix.

Each engine has a bit; a hash maps to the set of engines that hold it as an integer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbaton.engine.block_hash import BlockHash

RECENT_S = 10.0
MAX_RECENT_BLOCKS = 1 << 18


@dataclass(frozen=True, slots=True)
class _Recent:
    expires_at: float
    bit: int
    hashes: tuple[BlockHash, ...]


class PrefixIndex:
    """Holders of block hashes. Not thread-safe; times come from the caller."""

    def __init__(self, recent_s: float = RECENT_S, max_recent_blocks: int = MAX_RECENT_BLOCKS) -> None:
        self._recent_s = recent_s
        self._max_recent_blocks = max_recent_blocks
        self._bits: dict[str, int] = {}
        self._holders: dict[BlockHash, int] = {}
        self._recent: deque[_Recent] = deque()
        self._recent_counts: dict[tuple[BlockHash, int], int] = {}
        self._recent_blocks = 0

    def stored(self, engine_id: str, hashes: Iterable[BlockHash]) -> None:
        """The engine's cache has these blocks now."""
        bit = self._bit(engine_id)
        for block_hash in hashes:
            self._holders[block_hash] = self._holders.get(block_hash, 0) | bit

    def evicted(self, engine_id: str, hashes: Iterable[BlockHash]) -> None:
        """The engine's cache has lost these blocks; unknown ones are fine."""
        bit = self._bit(engine_id)
        for block_hash in hashes:
            self._clear(block_hash, bit)

    def reset(self, engine_id: str, hashes: Iterable[BlockHash] = ()) -> None:
        """Forget what was known of an engine's cache; it holds `hashes`. Own recent placements still count."""
        bit = self._bit(engine_id)
        for block_hash in [h for h, held in self._holders.items() if held & bit]:
            self._clear(block_hash, bit)
        self.stored(engine_id, hashes)

    def remove(self, engine_id: str) -> None:
        """The engine is gone, with all it held; its bit is free for another."""
        if engine_id in self._bits:
            self.reset(engine_id)
            bit = self._bits.pop(engine_id)
            kept = [recent for recent in self._recent if recent.bit != bit]
            for recent in self._recent:
                if recent.bit == bit:
                    self._drop(recent)
            self._recent = deque(kept)

    def placed(self, engine_id: str, hashes: Sequence[BlockHash], now: float) -> None:
        """A prompt with these blocks was sent to the engine: it will have them soon, if not already."""
        self._expire(now)
        recent = _Recent(now + self._recent_s, self._bit(engine_id), tuple(hashes))
        self._recent.append(recent)
        self._recent_blocks += len(recent.hashes)
        for block_hash in recent.hashes:
            key = (block_hash, recent.bit)
            self._recent_counts[key] = self._recent_counts.get(key, 0) + 1

    def match(self, engine_id: str, hashes: Sequence[BlockHash], now: float) -> int:
        """How many leading blocks of a prompt the engine holds or will hold soon."""
        self._expire(now)
        bit = self._bits.get(engine_id)
        if bit is None:
            return 0
        for count, block_hash in enumerate(hashes):
            if not self._holders.get(block_hash, 0) & bit and (block_hash, bit) not in self._recent_counts:
                return count
        return len(hashes)

    @property
    def num_hashes(self) -> int:
        """Distinct hashes that some engine is known to hold."""
        return len(self._holders)

    def _bit(self, engine_id: str) -> int:
        bit = self._bits.get(engine_id)
        if bit is None:
            used = sum(self._bits.values())
            bit = (used + 1) & ~used  # the lowest free one
            self._bits[engine_id] = bit
        return bit

    def _clear(self, block_hash: BlockHash, bit: int) -> None:
        left = self._holders.get(block_hash, 0) & ~bit
        if left:
            self._holders[block_hash] = left
        else:
            self._holders.pop(block_hash, None)

    def _expire(self, now: float) -> None:
        while self._recent and (self._recent[0].expires_at <= now or self._recent_blocks > self._max_recent_blocks):
            self._drop(self._recent.popleft())

    def _drop(self, recent: _Recent) -> None:
        self._recent_blocks -= len(recent.hashes)
        for block_hash in recent.hashes:
            key = (block_hash, recent.bit)
            left = self._recent_counts[key] - 1
            if left:
                self._recent_counts[key] = left
            else:
                del self._recent_counts[key]
