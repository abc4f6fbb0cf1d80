"""Random histories against a model that keeps no clever structure: it predicts every block id, event and count.

The model knows of each block its holders and of each cached hash its block and the moment it was last needed; who is
evictable it finds by looking at everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.kv.kv_manager import BlockCounts, CacheEventKind, KVManager, OutOfBlocks

pytestmark = pytest.mark.slow

T = TypeVar("T")

BLOCK = 2
NUM_BLOCKS = 9


@dataclass
class NaiveEntry:
    block_id: int
    parent: bytes | None
    needed_at: float  # the last moment at which it, or something below it, was held


@dataclass
class NaiveBooks:
    """Recomputes everything from `holders`, `free` and `entries` each time."""

    free: list[int] = field(default_factory=lambda: list(range(NUM_BLOCKS)))
    holders: dict[int, int] = field(default_factory=dict)
    entries: dict[bytes, NaiveEntry] = field(default_factory=dict)
    events: list[tuple[CacheEventKind, bytes]] = field(default_factory=list)
    now: float = 0.0

    def depth(self, block_hash: bytes) -> int:
        parent = self.entries[block_hash].parent
        return 0 if parent is None else 1 + self.depth(parent)

    def needed(self, block_hash: bytes) -> bool:
        entry = self.entries[block_hash]
        below = [other for other, e in self.entries.items() if e.parent == block_hash]
        return entry.block_id in self.holders or any(map(self.needed, below))

    def touch(self) -> None:
        """Called after each change of a holder: what is needed now was needed until now."""
        self.now += 1
        for block_hash, entry in self.entries.items():
            if self.needed(block_hash):
                entry.needed_at = self.now

    def evictable(self) -> list[bytes]:
        idle = [block_hash for block_hash in self.entries if not self.needed(block_hash)]
        return sorted(idle, key=lambda h: (self.entries[h].needed_at, -self.depth(h)))

    def allocate(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            if not self.free:
                gone = self.evictable()[0]
                assert not any(entry.parent == gone for entry in self.entries.values())
                self.free.append(self.entries.pop(gone).block_id)
                self.events.append((CacheEventKind.EVICTED, gone))
            block_id = self.free.pop(0)
            self.holders[block_id] = 1
            taken.append(block_id)
        return taken

    def match(self, hashes: list[bytes]) -> list[int]:
        found = []
        for block_hash in hashes:
            if block_hash not in self.entries:
                break
            found.append(self.entries[block_hash].block_id)
        for block_id in found:
            self.holders[block_id] = self.holders.get(block_id, 0) + 1
        self.touch()
        return found

    def release(self, blocks: list[int]) -> None:
        cached = {entry.block_id for entry in self.entries.values()}
        for block_id in reversed(blocks):
            self.touch()
            self.holders[block_id] -= 1
            if not self.holders[block_id]:
                del self.holders[block_id]
                if block_id not in cached:
                    self.free.append(block_id)

    def commit(self, hashes: list[bytes], blocks: list[int]) -> None:
        parent = None
        for block_hash, block_id in zip(hashes, blocks, strict=True):
            if block_hash not in self.entries:
                self.entries[block_hash] = NaiveEntry(block_id, parent, self.now)
                self.events.append((CacheEventKind.STORED, block_hash))
            parent = block_hash
        self.touch()


@dataclass(frozen=True)
class Held:
    """A sequence: its tokens, and a hold on each block of its table."""

    tokens: tuple[int, ...]
    table: tuple[int, ...]

    @property
    def hashes(self) -> list[bytes]:
        return block_hashes(self.tokens, BLOCK)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple)
FULL_PROMPTS = PROMPTS.map(lambda tokens: tokens + tokens if len(tokens) % BLOCK else tokens)


class KVManagerMachine(RuleBasedStateMachine):
    """Sequences with few distinct tokens, so that prefixes meet; far more of them than blocks."""

    held = Bundle("held")

    @initialize()
    def start(self) -> None:
        self.kv = KVManager(NUM_BLOCKS, BLOCK, prefix_cache=True)
        self.naive = NaiveBooks()

    def same(self, real: Callable[[], T], naive: Callable[[], T], count: int) -> T | None:
        """What both give; None if `count` more blocks are refused, as the model says they must be."""
        if count > len(self.naive.free) + len(self.naive.evictable()):
            with pytest.raises(OutOfBlocks):
                real()
            return None
        result = real()
        assert result == naive()
        return result

    @rule(target=held, prompt=PROMPTS | FULL_PROMPTS)
    def start_prompt(self, prompt: tuple[int, ...]) -> object:
        """As the prefill scheduler does: match, allocate the rest, give up cleanly."""
        wanted = block_hashes(prompt, BLOCK)
        cached = self.kv.match(wanted)
        assert cached == self.naive.match(wanted)
        count = -(-len(prompt) // BLOCK) - len(cached)
        fresh = self.same(lambda: self.kv.allocate(count), lambda: self.naive.allocate(count), count)
        if fresh is None:
            self.kv.release(cached)
            self.naive.release(cached)
            return multiple()
        return Held(prompt, tuple(cached + fresh))

    @rule(seq=held, keep=st.sampled_from((0.5, 1.0, 1.0)))
    def commit(self, seq: Held, keep: float) -> None:
        full = int(len(seq.hashes) * keep + 0.5)
        self.kv.commit(seq.hashes[:full], seq.table[:full])
        self.naive.commit(seq.hashes[:full], list(seq.table[:full]))

    @rule(target=held, seq=held)
    def fork(self, seq: Held) -> Held:
        self.kv.fork(seq.table)
        for block_id in seq.table:
            self.naive.holders[block_id] += 1
        return seq

    @rule(target=held, seq=consumes(held), token=st.integers(2, 3))
    def write(self, seq: Held, token: int) -> Held:
        """Change a token of the last block, which becomes private; the sequence is another one from then on."""
        block_id = seq.table[-1]
        cached = block_id in {entry.block_id for entry in self.naive.entries.values()}
        if self.naive.holders[block_id] == 1 and not cached:
            assert self.kv.make_writable(block_id) == (block_id, None)
            return self.rewritten(seq, block_id, token)

        def naive() -> tuple[int, tuple[int, int]]:
            (private,) = self.naive.allocate(1)
            self.naive.release([block_id])
            return private, (block_id, private)

        result = self.same(lambda: self.kv.make_writable(block_id), naive, 1)
        return seq if result is None else self.rewritten(seq, result[0], token)

    def rewritten(self, seq: Held, block_id: int, token: int) -> Held:
        start = (len(seq.table) - 1) * BLOCK
        return Held((*seq.tokens[:start], token, *seq.tokens[start + 1 :]), (*seq.table[:-1], block_id))

    @rule(seq=consumes(held))
    def release(self, seq: Held) -> None:
        table = list(seq.table)
        self.kv.free(table)
        assert table == []
        self.naive.release(list(seq.table))

    @invariant()
    def agree(self) -> None:
        self.kv.check()
        free, held = len(self.naive.free), len(self.naive.holders)
        assert self.kv.counts() == BlockCounts(free, held, NUM_BLOCKS - free - held, NUM_BLOCKS)
        assert self.kv.available == free + len(self.naive.evictable())
        assert [self.kv.holders(b) for b in range(NUM_BLOCKS)] == [
            self.naive.holders.get(b, 0) for b in range(NUM_BLOCKS)
        ]
        assert [(event.kind, event.block_hash) for event in self.kv.drain_events()] == self.naive.events
        self.naive.events.clear()
        assert set(self.kv.snapshot().hashes) == set(self.naive.entries)


TestKVManagerAgainstModel = KVManagerMachine.TestCase
TestKVManagerAgainstModel.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
