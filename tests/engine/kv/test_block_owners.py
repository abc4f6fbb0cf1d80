"""Why each block is held, with the totals in step."""

from __future__ import annotations

import random

from kvbaton.engine.kv.block_owners import BlockOwners, Owner


def totals(owners: BlockOwners) -> tuple[int, int, int]:
    return owners.count(Owner.QUARANTINE), owners.count(Owner.LANDING), owners.count(Owner.HOLD)


def test_shared_block_counts_once_for_its_strictest_reason() -> None:
    """Guards a sum of owners that exceeds the pool."""
    owners = BlockOwners()
    owners.change(None, Owner.HOLD, [1, 2])
    owners.change(None, Owner.HOLD, [2, 3])
    assert totals(owners) == (0, 0, 3)
    owners.change(Owner.HOLD, Owner.QUARANTINE, [2, 3])
    assert totals(owners) == (2, 0, 1)
    assert [owners.of(block) for block in (1, 2, 3, 4)] == [Owner.HOLD, Owner.QUARANTINE, Owner.QUARANTINE, None]
    owners.change(Owner.QUARANTINE, None, [2, 3])
    assert totals(owners) == (0, 0, 2), "the first hand-off still holds block 2"
    owners.change(Owner.HOLD, None, [1, 2])
    assert (owners.listed, owners.blocks()) == (0, frozenset())


def test_totals_are_those_of_a_recount() -> None:
    """Guards drift: the gauges are never counted anew."""
    rng = random.Random(7)
    owners = BlockOwners()
    open_ones: list[tuple[Owner, list[int]]] = []
    for _ in range(2000):
        if open_ones and rng.random() < 0.5:
            owner, blocks = open_ones.pop(rng.randrange(len(open_ones)))
            after = rng.choice([None, *Owner])
            owners.change(owner, after, blocks)
            if after is not None:
                open_ones.append((after, blocks))
        else:
            owner, blocks = rng.choice(list(Owner)), rng.sample(range(30), rng.randrange(6))
            owners.change(None, owner, blocks)
            open_ones.append((owner, blocks))
        strictest = {}
        for owner, blocks in open_ones:
            for block in blocks:
                strictest[block] = min(owner, strictest.get(block, owner))
        assert totals(owners) == tuple(sum(o is owner for o in strictest.values()) for owner in Owner)
