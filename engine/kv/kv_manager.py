"""The books of an engine's KV pool: who holds which block, and which finished blocks can be found again by prefix.

free     contents mean nothing                  allocate takes from here first
held     one or more holders                    a sequence, a hand-off, a reader
cached   no holder, found by its hash           match holds it again; allocate evicts it when free ones run out

free + held + cached = total, always. All calls come from the engine thread; nothing here touches memory.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.block_hash import BlockHash
from kvbaton.engine.kv.block_pool import BlockMisuse, BlockPool, OutOfBlocks
from kvbaton.engine.kv.prefix_cache import BrokenInvariant, PrefixCache

__all__ = ["BlockCounts", "BlockMisuse", "BrokenInvariant", "CacheEvent", "CacheEventKind", "KVManager", "OutOfBlocks"]

MAX_PENDING_EVENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Every block is in exactly one of the first three."""

    free: int
    held: int
    cached: int
    total: int


class CacheEventKind(enum.StrEnum):
    STORED = "stored"
    EVICTED = "evicted"


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """A prefix can, or can no longer, be found here. Numbered from 1 on; a gap means that events were lost."""

    number: int
    kind: CacheEventKind
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """All that is cached after event `number`, parents before children: repairs a gap."""

    number: int
    hashes: tuple[BlockHash, ...]


class KVManager:
    """One owner for every block at every moment."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache()
        self._caching = prefix_cache
        self._events: deque[CacheEvent] = deque(maxlen=MAX_PENDING_EVENTS)
        self._event_number = 0

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def available(self) -> int:
        """How many blocks `allocate` can give: free ones, and cached ones that no held block builds on."""
        return self._pool.num_free + self._cache.num_evictable

    def counts(self) -> BlockCounts:
        total, free, held = self._pool.num_blocks, self._pool.num_free, self._pool.num_held
        return BlockCounts(free, held, total - free - held, total)

    def holders(self, block_id: int) -> int:
        """How many hold the block."""
        return self._pool.holders(block_id)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest cached prefix, each with one hold more, which the caller releases."""
        blocks = self._cache.match(hashes)
        self._hold(blocks)
        return blocks

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one hold each, evicting cached leaves as needed. Raises `OutOfBlocks`, taking nothing."""
        if count > self.available:
            raise OutOfBlocks(count, self.available)
        return [self._take() for _ in range(count)]

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one hold each. The last one leaves a block cached if its hash is registered, else free.

        Goes from the last block to the first, so that a prefix outlives what was built on it.
        """
        for block_id in reversed(block_ids):
            if not self._pool.drop(block_id):
                continue
            if block_id in self._cache:
                self._cache.release(block_id)
            else:
                self._pool.give_back(block_id)

    def free(self, block_table: list[int]) -> None:
        """Release a sequence's blocks and empty its table: what everyone calls who ends or preempts one."""
        self.release(block_table)
        block_table.clear()

    def commit(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        """Make held, full blocks findable: `block_ids[i]` has the content that `hashes[i]` names, from block 0 on.

        A hash that is cached in another block stays there, and ours stays private; what follows it hangs below the
        cached one. The cost is that of the blocks not registered yet.
        """
        if len(hashes) != len(block_ids):
            raise ValueError(f"{len(hashes)} hashes for {len(block_ids)} blocks")
        if not self._caching:
            return
        for i in range(self._cache.known_prefix(hashes), len(hashes)):
            if not self._pool.holders(block_ids[i]):
                raise BlockMisuse(f"block {block_ids[i]} is committed but nobody holds it")
            self._cache.insert(hashes[i - 1] if i else None, hashes[i], block_ids[i])
            self._record(CacheEventKind.STORED, hashes[i])

    def fork(self, block_ids: Sequence[int]) -> None:
        """One more hold each, for a sample or beam that shares these held blocks until it writes."""
        for block_id in block_ids:
            if not self._pool.holders(block_id):
                raise BlockMisuse(f"block {block_id} is shared but nobody holds it")
        self._hold(block_ids)

    def is_private(self, block_id: int) -> bool:
        """Whether the one holder of a block may write to it."""
        return self._pool.holders(block_id) == 1 and block_id not in self._cache

    def make_writable(self, block_id: int) -> tuple[int, tuple[int, int] | None]:
        """Copy-on-write for a held block that is about to change.

        Returns the block to write to and the copy (source, destination) to make first, None if the block is already
        the caller's alone. With a copy the caller's hold moves to the new block. Raises `OutOfBlocks`.
        """
        if not self._pool.holders(block_id):
            raise BlockMisuse(f"block {block_id} is written but nobody holds it")
        if self.is_private(block_id):
            return block_id, None
        (private,) = self.allocate(1)
        self.release([block_id])
        return private, (block_id, private)

    def drain_events(self) -> list[CacheEvent]:
        """Events since the last call; of more than `MAX_PENDING_EVENTS` the oldest are lost, a gap in the numbers."""
        events = list(self._events)
        self._events.clear()
        return events

    def snapshot(self) -> CacheSnapshot:
        return CacheSnapshot(self._event_number, tuple(self._cache.hashes()))

    def check(self) -> None:
        """Raise `BrokenInvariant` unless every block is exactly one of free, held and cached, and all counts agree."""
        self._cache.check()
        free = list(self._pool.free_blocks())
        if len(set(free)) != len(free) or not all(map(self._pool.is_free, free)):
            raise BrokenInvariant("the free list names a block twice, or one that is in use")
        held = 0
        for block_id in range(self.num_blocks):
            held += self._pool.holders(block_id) > 0
            self._check_block(block_id)
        counts = self.counts()
        if counts.held != held or min(counts.free, counts.held, counts.cached) < 0:
            raise BrokenInvariant(f"{counts} but {held} blocks have holders")

    def _check_block(self, block_id: int) -> None:
        holders, is_free, cached = self._pool.holders(block_id), self._pool.is_free(block_id), block_id in self._cache
        if is_free and (holders or cached):
            raise BrokenInvariant(f"block {block_id} is free with {holders} holders, cached: {cached}")
        if not is_free and not holders and not cached:
            raise BrokenInvariant(f"block {block_id} is lost: neither free nor held nor cached")
        if cached and self._cache.is_held(block_id) != (holders > 0):
            raise BrokenInvariant(f"block {block_id} has {holders} holders but the prefix cache believes otherwise")

    def _hold(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self._pool.hold(block_id):
                self._cache.hold(block_id)

    def _take(self) -> int:
        if not self._pool.num_free:
            node = self._cache.evict()
            self._record(CacheEventKind.EVICTED, node.block_hash)
            self._pool.give_back(node.block_id)
        return self._pool.take()

    def _record(self, kind: CacheEventKind, block_hash: BlockHash) -> None:
        self._event_number += 1
        self._events.append(CacheEvent(self._event_number, kind, block_hash))
