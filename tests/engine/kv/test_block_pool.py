"""The free list and the holder counts: exact ids, exact order, and every misuse named."""

from __future__ import annotations

import pytest

from kvbaton.engine.kv.block_pool import BlockMisuse, BlockPool, OutOfBlocks


def test_blocks_come_in_order_and_return_first_in_first_out() -> None:
    """Guards determinism: two engines with the same history must use the same blocks."""
    pool = BlockPool(4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    for block_id in (2, 0, 3):
        assert pool.drop(block_id)
        pool.give_back(block_id)
    assert list(pool.free_blocks()) == [2, 0, 3]
    assert [pool.take(), pool.take()] == [2, 0]
    assert (pool.num_free, pool.num_held) == (1, 3)


def test_a_block_is_idle_only_after_its_last_holder() -> None:
    """Guards sharing: a block freed under a second reader corrupts that reader."""
    pool = BlockPool(1)
    block_id = pool.take()
    assert not pool.hold(block_id)
    assert pool.holders(block_id) == 2
    assert not pool.drop(block_id)
    assert pool.drop(block_id)
    assert (pool.num_held, pool.num_free, pool.is_free(block_id)) == (0, 0, False)
    assert pool.hold(block_id)
    assert pool.num_held == 1


def test_an_empty_pool_says_so() -> None:
    """Guards against a block being given to two owners when none is left."""
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(OutOfBlocks, match="1 KV blocks needed, 0 available"):
        pool.take()


def test_double_release_is_an_error() -> None:
    """Guards the worst accounting bug: a block that is in the free list twice."""
    pool = BlockPool(2)
    block_id = pool.take()
    pool.drop(block_id)
    with pytest.raises(BlockMisuse, match="block 0 is released but nobody holds it"):
        pool.drop(block_id)
    pool.give_back(block_id)
    with pytest.raises(BlockMisuse, match="block 0 is free"):
        pool.drop(block_id)
    with pytest.raises(BlockMisuse, match="block 0 is free"):
        pool.give_back(block_id)
    assert list(pool.free_blocks()) == [1, 0]


def test_a_held_block_is_not_freed_and_a_free_one_not_held() -> None:
    """Guards use after release."""
    pool = BlockPool(2)
    with pytest.raises(BlockMisuse, match="block 1 is free"):
        pool.hold(1)
    pool.take()
    with pytest.raises(BlockMisuse, match="block 0 is freed but has 1 holders"):
        pool.give_back(0)


@pytest.mark.parametrize("block_id", [-1, 2])
def test_unknown_blocks_are_refused(block_id: int) -> None:
    """Guards against -1 silently meaning the last block."""
    pool = BlockPool(2)
    for operation in (pool.hold, pool.drop, pool.give_back, pool.holders, pool.is_free):
        with pytest.raises(BlockMisuse, match=f"block {block_id} does not exist in a pool of 2"):
            operation(block_id)


def test_a_pool_has_blocks() -> None:
    """Guards against an engine that starts and can never serve."""
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
