"""Why each block is held, with the totals in step."""

from __future__ import annotations

import random

from kvbaton.engine.kv.block_owners import BlockOwners, Holding, Owner, audit_blocks
from kvbaton.engine.kv.kv_manager import KVManager


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
    assert owners.listed == 0
    assert [owners.of(block) for block in (1, 2, 3)] == [None] * 3


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


class TestAudit:
    """A pool of six blocks: what a sequence holds, what a hand-off holds beside it, and every way to be wrong."""

    def setup_method(self) -> None:
        self.kv = KVManager(6, 4, prefix_cache=True)
        self.owners = BlockOwners()
        self.table = self.kv.allocate(3)
        self.kv.fork(self.table[:2])
        self.owners.change(None, Owner.HOLD, self.table[:2])
        self.holdings = [Holding(self.table), Holding(self.table[:2], Owner.HOLD)]

    def problems(self, *holdings: Holding, written: tuple[int, ...] = ()) -> str:
        return "; ".join(audit_blocks(self.kv, self.owners, holdings or self.holdings, written).problems)

    def test_all_holders_known(self) -> None:
        audit = audit_blocks(self.kv, self.owners, self.holdings, written=self.table[2:])
        assert (audit.problems, audit.free, audit.hold, audit.sequence, audit.held) == ((), 3, 2, 1, 3)

    def test_block_that_nobody_owns_up_to(self) -> None:
        assert "block 2 has 1 holders, 0 of them are known" in self.problems(
            Holding(self.table[:2]), *self.holdings[1:]
        )

    def test_block_that_is_held_for_another_reason_than_listed(self) -> None:
        wrong = self.problems(self.holdings[0], Holding(self.table[:2], Owner.QUARANTINE))
        assert "block 0 is held for [<Owner.QUARANTINE: 0>], listed as <Owner.HOLD: 2>" in wrong

    def test_block_that_is_listed_and_held_for_nothing(self) -> None:
        assert "listed as <Owner.HOLD: 2>" in self.problems(self.holdings[0], Holding(self.table[:2]))

    def test_strictest_of_two_reasons_is_the_listed_one(self) -> None:
        self.kv.fork(self.table[:1])
        self.owners.change(None, Owner.QUARANTINE, self.table[:1])
        assert self.problems(*self.holdings, Holding(self.table[:1], Owner.QUARANTINE)) == ""

    def test_write_to_a_block_that_nobody_holds(self) -> None:
        assert self.problems(written=(5,)) == "block 5 is being written and nobody holds it"
