"""The radix tree: what is found, and the exact order in which blocks are given up."""

from __future__ import annotations

import pytest

from kvbaton.engine.kv.prefix_cache import BrokenInvariant, PrefixCache


def tree(*paths: str) -> tuple[PrefixCache, dict[str, int]]:
    """A cache with a node per prefix of each path ("ab" has nodes "a" and "ab"), all held; and their block ids."""
    cache, blocks = PrefixCache(), dict[str, int]()
    for path in paths:
        for end in range(1, len(path) + 1):
            name = path[:end]
            if name not in blocks:
                blocks[name] = len(blocks)
                cache.insert(name[:-1].encode() or None, name.encode(), blocks[name])
    cache.check()
    return cache, blocks


def release(cache: PrefixCache, blocks: dict[str, int], *names: str) -> None:
    for name in names:
        cache.release(blocks[name])
        cache.check()


def evict_all(cache: PrefixCache) -> list[str]:
    order = []
    while cache.num_evictable:
        order.append(cache.evict().block_hash.decode())
        cache.check()
    return order


def test_the_longest_prefix_is_found() -> None:
    """Guards reuse: too short wastes compute, too long answers from another prompt's blocks."""
    cache, blocks = tree("abc", "abd")
    assert cache.match([b"a", b"ab", b"abd", b"abdx"]) == [blocks["a"], blocks["ab"], blocks["abd"]]
    assert cache.match([b"x", b"ab"]) == []
    assert cache.known_prefix([b"a", b"ab", b"abd", b"abdx"]) == 3
    assert cache.known_prefix([b"x", b"xy"]) == 0


def test_leaves_go_before_their_parents_and_old_before_new() -> None:
    """Guards the tree: an evicted parent would leave children that no prompt can reach."""
    cache, blocks = tree("abc", "ad")
    release(cache, blocks, "ad", "abc", "ab", "a")
    assert evict_all(cache) == ["ad", "abc", "ab", "a"]
    assert len(cache) == 0


def test_a_parent_released_before_its_child_still_outlives_it() -> None:
    """Guards the order against callers that release front to back."""
    cache, blocks = tree("abc")
    release(cache, blocks, "a", "ab")
    assert cache.num_evictable == 0
    release(cache, blocks, "abc")
    assert list(cache.evictable()) == [blocks["abc"], blocks["ab"], blocks["a"]]


def test_a_held_descendant_keeps_its_whole_path() -> None:
    """Guards `num_evictable`, which admission trusts: a parent below which somebody reads cannot be had."""
    cache, blocks = tree("abc", "abd")
    release(cache, blocks, "abd", "ab", "a")
    assert list(cache.evictable()) == [blocks["abd"]]
    assert evict_all(cache) == ["abd"]
    with pytest.raises(KeyError):
        cache.evict()


def test_use_makes_a_branch_young_again() -> None:
    """Guards LRU: a prefix in use must survive one that is not, whichever came first."""
    cache, blocks = tree("a", "b", "c")
    release(cache, blocks, "a", "b", "c")
    cache.hold(blocks["a"])
    assert list(cache.evictable()) == [blocks["b"], blocks["c"]]
    release(cache, blocks, "a")
    assert evict_all(cache) == ["b", "c", "a"]


def test_a_shared_parent_ages_with_its_last_user() -> None:
    """Guards the common system prompt: it must not be evicted because its first user left long ago."""
    cache, blocks = tree("ab", "ac")
    release(cache, blocks, "ab")
    other, other_blocks = blocks["ac"], blocks["a"]
    cache.release(other)
    cache.release(other_blocks)
    assert list(cache.evictable()) == [blocks["ab"], blocks["ac"], blocks["a"]]


def test_a_hash_or_block_is_registered_once() -> None:
    """Guards the two maps: a second entry would leave one of them pointing at a block with other content."""
    cache, _ = tree("a")
    with pytest.raises(BrokenInvariant, match="cached already"):
        cache.insert(None, b"a", 7)
    with pytest.raises(BrokenInvariant, match="cached already"):
        cache.insert(None, b"b", 0)


def test_check_finds_a_broken_count() -> None:
    """Guards the guard: teardown checks that cannot fail protect nothing."""
    cache, blocks = tree("ab")
    cache._by_block[blocks["a"]].pins += 1
    with pytest.raises(BrokenInvariant, match="block 0: 3 pins, 1 children; counted 2, 1"):
        cache.check()
    cache, blocks = tree("ab")
    release(cache, blocks, "ab", "a")
    cache._queue.move_to_end(b"ab")
    with pytest.raises(BrokenInvariant, match="block 1 would be evicted after its parent"):
        cache.check()
