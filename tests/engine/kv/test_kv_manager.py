"""Who holds which block, through every operation of the manager: exact ids, counts and events."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import pytest

from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.kv import kv_manager
from kvbaton.engine.kv.kv_manager import (
    BlockCounts,
    BlockMisuse,
    BrokenInvariant,
    CacheEvent,
    CacheEventKind,
    KVManager,
    OutOfBlocks,
)
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence

BLOCK = 4


@pytest.fixture
def kv() -> Iterator[KVManager]:
    manager = KVManager(8, BLOCK, prefix_cache=True)
    yield manager
    manager.check()


def hashes(num_blocks: int, start: int = 0, salt: str = "") -> list[bytes]:
    return block_hashes(list(range(start, start + num_blocks * BLOCK)), BLOCK, salt)


def stored(kv: KVManager, num_blocks: int, start: int = 0) -> list[int]:
    """A prompt of full blocks, computed, committed and still held."""
    blocks = kv.allocate(num_blocks)
    kv.commit(hashes(num_blocks, start), blocks)
    return blocks


def cached(kv: KVManager, wanted: list[bytes]) -> int:
    """Length of the longest prefix that a match would find, without touching it."""
    known = set(kv.snapshot().hashes)
    return len(list(takewhile(known.__contains__, wanted)))


def test_free_releases_a_table_and_empties_it(kv: KVManager) -> None:
    """Guards the one way out: a table that is freed twice must not give back what somebody else has by then."""
    table = kv.allocate(3)
    kv.fork(table[:1])
    first = table[0]
    kv.free(table)
    assert table == []
    assert (kv.holders(first), kv.counts().held) == (1, 1)
    kv.free(table)
    assert kv.counts().held == 1


def test_allocate_takes_the_longest_free_first(kv: KVManager) -> None:
    """Guards determinism of block ids."""
    assert kv.allocate(3) == [0, 1, 2]
    kv.release([0, 1])
    assert kv.allocate(7) == [3, 4, 5, 6, 7, 1, 0]
    assert kv.counts() == BlockCounts(free=0, held=8, cached=0, total=8)


def test_a_refused_allocation_takes_nothing(kv: KVManager) -> None:
    """Guards against a leak, and against evicting prefixes for a request that then waits anyway."""
    kept = stored(kv, 2)
    kv.release(kept)
    kv.allocate(5)
    with pytest.raises(OutOfBlocks, match="4 KV blocks needed, 3 available") as error:
        kv.allocate(4)
    assert (error.value.needed, error.value.available) == (4, 3)
    assert kv.counts() == BlockCounts(free=1, held=5, cached=2, total=8)
    assert cached(kv, hashes(2)) == 2


def test_released_prefixes_are_found_again(kv: KVManager) -> None:
    """Guards reuse: same blocks, in prompt order, held."""
    first = stored(kv, 3)
    tail = kv.allocate(1)
    kv.release(first + tail)
    assert kv.counts() == BlockCounts(free=5, held=0, cached=3, total=8)
    assert kv.match(hashes(4)) == first
    assert [kv.holders(block) for block in first] == [1, 1, 1]
    assert kv.match(hashes(2)) == first[:2]
    assert [kv.holders(block) for block in first] == [2, 2, 1]
    assert kv.counts() == BlockCounts(free=5, held=3, cached=0, total=8)


def test_where_generated_tokens_begin_is_part_of_a_hash() -> None:
    """Their KV differs in its last bits from that of a prompt; a block of prompt alone is the same for everyone."""
    tokens = list(range(4 * BLOCK))
    chains = {start: block_hashes(tokens, BLOCK, num_prompt=start) for start in range(1, 4 * BLOCK)}
    prompt = block_hashes(tokens, BLOCK)
    assert block_hashes(tokens, BLOCK, num_prompt=len(tokens)) == prompt
    for start, chain in chains.items():
        assert chain[: start // BLOCK] == prompt[: start // BLOCK]
    made = [block_hash for start, chain in chains.items() for block_hash in chain[start // BLOCK :]]
    assert len({*made, *prompt}) == len(made) + len(prompt)


def test_a_sequence_names_its_blocks_as_the_router_does() -> None:
    request = Request("r", tuple(range(2 * BLOCK + 1)), SamplingParams(max_tokens=99), (0,), (5,) * BLOCK, 1, "salt")
    want = block_hashes(request.context, BLOCK, "salt", num_prompt=2 * BLOCK + 1)
    assert Sequence(request, 0.0).hashes(BLOCK, 3) == want
    assert want[2] != block_hashes(request.context, BLOCK, "salt")[2]


def test_other_salts_and_other_tokens_do_not_match(kv: KVManager) -> None:
    """Guards tenants from each other's prefixes."""
    kv.release(stored(kv, 2))
    assert kv.match(hashes(2, salt="tenant")) == []
    assert kv.match(hashes(2, start=1)) == []


def test_eviction_takes_leaves_of_the_least_recent_prefix(kv: KVManager) -> None:
    """Guards the order: the end of the oldest prompt goes first, the beginning of the newest last."""
    old, new = stored(kv, 3), stored(kv, 3, start=100)
    kv.release(old)
    kv.release(new)
    kv.drain_events()
    assert kv.allocate(2) == [6, 7]
    assert kv.allocate(4) == [old[2], old[1], old[0], new[2]]
    evicted = [(event.kind, event.block_hash) for event in kv.drain_events()]
    gone = [*reversed(hashes(3)), hashes(3, start=100)[2]]
    assert evicted == [(CacheEventKind.EVICTED, block_hash) for block_hash in gone]
    assert kv.match(hashes(3, start=100)) == new[:2]


def test_held_blocks_are_never_evicted(kv: KVManager) -> None:
    """Guards running sequences: their prefix is not room for others."""
    kv.release(stored(kv, 3))
    held = kv.match(hashes(2))
    assert kv.available == 6
    kv.allocate(6)
    with pytest.raises(OutOfBlocks):
        kv.allocate(1)
    assert cached(kv, hashes(3)) == 2
    kv.release(held)


def test_a_private_duplicate_hangs_its_children_below_the_cached_block(kv: KVManager) -> None:
    """Guards two prompts computed at once: one copy of the common block is cached, both continuations are found."""
    one, two = kv.allocate(2), kv.allocate(2)
    common = hashes(1)
    left = block_hashes([*range(BLOCK), 1, 1, 1, 1], BLOCK)
    right = block_hashes([*range(BLOCK), 2, 2, 2, 2], BLOCK)
    assert left[:1] == right[:1] == common
    kv.commit(left, one)
    kv.commit(right, two)
    kv.check()
    assert kv.match(right) == [one[0], two[1]]
    kv.release([one[0], two[1]])
    kv.release(one)
    # block one[0] has no holder any more but two[1], which is held, builds on it
    assert kv.counts() == BlockCounts(free=4, held=2, cached=2, total=8)
    assert kv.available == 5
    kv.release(two)
    assert kv.counts() == BlockCounts(free=5, held=0, cached=3, total=8)
    assert kv.available == 8


def test_commit_registers_only_what_is_new(kv: KVManager) -> None:
    """Guards events and cost: a growing sequence announces each block once."""
    blocks = kv.allocate(3)
    for full in (1, 1, 3):
        kv.commit(hashes(3)[:full], blocks[:full])
    assert kv.drain_events() == [
        CacheEvent(number, CacheEventKind.STORED, block_hash) for number, block_hash in enumerate(hashes(3), start=1)
    ]
    assert kv.drain_events() == []


def test_commit_refuses_blocks_that_nobody_holds(kv: KVManager) -> None:
    """Guards the cache from content that may change at any moment."""
    with pytest.raises(BlockMisuse, match="block 0 is committed but nobody holds it"):
        kv.commit(hashes(1), [0])
    with pytest.raises(ValueError, match="2 hashes for 1 blocks"):
        kv.commit(hashes(2), kv.allocate(1))


def test_forks_share_until_they_write(kv: KVManager) -> None:
    """Guards n > 1: each sample gets its own tail, the last one keeps the original, the prompt stays shared."""
    prompt = stored(kv, 2)
    tail = kv.allocate(1)
    for _ in range(2):
        kv.fork(prompt + tail)
    assert [kv.holders(block) for block in prompt + tail] == [3, 3, 3]
    assert kv.make_writable(tail[0]) == (3, (tail[0], 3))
    assert kv.make_writable(tail[0]) == (4, (tail[0], 4))
    assert kv.make_writable(tail[0]) == (tail[0], None)
    assert [kv.holders(block) for block in (*prompt, tail[0], 3, 4)] == [3, 3, 1, 1, 1]


def test_a_cached_block_is_copied_before_a_write(kv: KVManager) -> None:
    """Guards the cache: a registered block must keep the content that its hash names."""
    blocks = stored(kv, 1)
    assert kv.make_writable(blocks[0]) == (1, (0, 1))
    assert kv.counts() == BlockCounts(free=6, held=1, cached=1, total=8)
    assert cached(kv, hashes(1)) == 1


def test_copy_on_write_without_room_changes_nothing(kv: KVManager) -> None:
    """Guards preemption, which retries after this error."""
    blocks = kv.allocate(8)
    kv.fork(blocks[:1])
    with pytest.raises(OutOfBlocks):
        kv.make_writable(blocks[0])
    assert kv.holders(blocks[0]) == 2
    kv.release([blocks[7]])
    assert kv.make_writable(blocks[0]) == (7, (0, 7))


def test_misuse_is_named(kv: KVManager) -> None:
    """Guards the books: every wrong call says which block, and does no harm."""
    (block,) = kv.allocate(1)
    kv.release([block])
    for operation in (lambda: kv.release([block]), lambda: kv.fork([block]), lambda: kv.make_writable(block)):
        with pytest.raises(BlockMisuse, match="block 0"):
            operation()
    with pytest.raises(BlockMisuse, match="does not exist"):
        kv.release([8])
    kv.release(stored(kv, 1))
    with pytest.raises(BlockMisuse, match="nobody holds it"):
        kv.release([1])
    with pytest.raises(BlockMisuse, match="nobody holds it"):
        kv.fork([1])


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    """Guards the switch."""
    kv = KVManager(4, BLOCK, prefix_cache=False)
    kv.release(stored(kv, 2))
    assert kv.counts() == BlockCounts(free=4, held=0, cached=0, total=4)
    assert (kv.match(hashes(2)), kv.drain_events()) == ([], [])
    kv.check()


def test_a_snapshot_repairs_lost_events(kv: KVManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the router's index: an unread event log stays bounded, the gap shows, the snapshot has the rest."""
    monkeypatch.setattr(kv_manager, "MAX_PENDING_EVENTS", 2)
    small = KVManager(8, BLOCK, prefix_cache=True)
    stored(small, 3)
    assert [event.number for event in small.drain_events()] == [2, 3]
    snapshot = small.snapshot()
    assert (snapshot.number, list(snapshot.hashes)) == (3, hashes(3))


def test_check_finds_lost_and_doubled_blocks() -> None:
    """Guards the guard of every other test's teardown."""
    kv = KVManager(4, BLOCK, prefix_cache=True)
    kv.allocate(1)
    kv._pool.drop(0)
    with pytest.raises(BrokenInvariant, match="block 0 is lost"):
        kv.check()
    kv = KVManager(4, BLOCK, prefix_cache=True)
    kv._pool._free.append(2)
    with pytest.raises(BrokenInvariant, match="names a block twice"):
        kv.check()
    kv = KVManager(4, BLOCK, prefix_cache=True)
    stored(kv, 1)
    kv._pool.drop(0)
    with pytest.raises(BrokenInvariant, match="block 0 has 0 holders but the prefix cache believes otherwise"):
        kv.check()


def test_block_size_is_checked() -> None:
    """Guards the division by it."""
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        KVManager(4, 0, prefix_cache=True)
