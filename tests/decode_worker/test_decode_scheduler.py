"""Continuous batching: who gets a row, who gives way, and what a row on its way changes."""

from __future__ import annotations

import pytest

from kvbaton.decode_worker.scheduler import DecodePlan, DecodeScheduler
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence, Status


class Rig:
    """Blocks of 4 tokens."""

    def __init__(self, num_blocks: int = 16, max_running: int = 8, max_model_len: int = 100) -> None:
        self.kv = KVManager(num_blocks, 4, prefix_cache=True)
        self.scheduler = DecodeScheduler(self.kv, max_running, max_model_len)

    def add(self, name: str, tokens: int, arrival_s: float = 0.0, max_tokens: int = 50) -> Sequence:
        """A sequence of which all but the newest token are computed."""
        request = Request(name, tuple(range(1, tokens + 1)), SamplingParams(max_tokens=max_tokens))
        seq = Sequence(request, arrival_s)
        seq.num_computed = tokens - 1
        seq.block_table = self.kv.allocate(-(-seq.num_computed // 4))
        self.scheduler.add(seq)
        return seq

    def names(self, plan: DecodePlan) -> list[str]:
        return [row.seq.request.request_id for row in plan.rows]


def test_one_row_each_oldest_arrival_first() -> None:
    rig = Rig()
    for name, arrival_s in (("b", 2.0), ("c", 3.0), ("a", 1.0)):
        rig.add(name, 6, arrival_s)
    plan = rig.scheduler.schedule()
    assert rig.names(plan) == ["a", "b", "c"]
    assert all((row.num_tokens, row.samples, row.ahead) == (1, (0,), 0) for row in plan.rows)
    assert (plan.copies, plan.preempted) == ([], [])


def test_only_so_many_run_in_a_step() -> None:
    rig = Rig(max_running=2)
    for i in range(3):
        rig.add(f"r{i}", 6, float(i))
    assert rig.names(rig.scheduler.schedule()) == ["r0", "r1"]


def test_full_last_block_is_followed_by_a_new_one() -> None:
    rig = Rig()
    seq = rig.add("a", 9)
    rig.scheduler.schedule()
    assert len(seq.block_table) == 3


def test_shared_block_is_copied_before_it_is_written() -> None:
    rig = Rig()
    seq = rig.add("a", 7)
    shared = seq.block_table[1]
    rig.kv.fork([shared])
    plan = rig.scheduler.schedule()
    assert plan.copies == [(shared, seq.block_table[1])]
    assert rig.kv.holders(shared) == 1


def test_youngest_gives_way_and_keeps_nothing() -> None:
    rig = Rig(num_blocks=4)
    old, young = rig.add("old", 9, 0.0), rig.add("young", 7, 1.0)
    plan = rig.scheduler.schedule()
    assert (rig.names(plan), plan.preempted) == (["old"], [young])
    assert (young.status, young.block_table, young.num_computed) == (Status.PREEMPTED, [], 0)
    assert (len(old.block_table), rig.scheduler.num_preemptions) == (3, 1)


def test_last_one_gives_way_to_nobody_but_itself() -> None:
    rig = Rig(num_blocks=3)
    seq = rig.add("a", 9)
    held = rig.kv.allocate(1)
    plan = rig.scheduler.schedule()
    assert (plan.rows, plan.preempted, rig.scheduler.running) == ([], [seq], [])
    assert rig.kv.counts().held == len(held)


def test_nobody_gives_way_with_a_row_on_its_way() -> None:
    """Guards blocks that a launched row still writes: the caller has to let it land first."""
    rig = Rig(num_blocks=4)
    rig.add("old", 9, 0.0)
    rig.add("young", 7, 1.0).in_flight = 1
    assert not rig.scheduler.has_room()
    with pytest.raises(RuntimeError, match="young gives way with a row on its way"):
        rig.scheduler.schedule()


@pytest.mark.parametrize(("free", "room"), [(0, False), (1, False), (2, True)])
def test_room_is_a_slot_for_everybody(free: int, room: bool) -> None:
    """Two of three sequences need a block: one is at a boundary, one shares its last block."""
    rig = Rig(num_blocks=16)
    rig.add("boundary", 9)
    rig.kv.fork(rig.add("shared", 7).block_table[1:])
    rig.add("inside", 7)
    rig.kv.allocate(rig.kv.available - free)
    assert rig.scheduler.has_room() is room


def test_row_behind_one_on_its_way_unless_that_ends_it() -> None:
    rig = Rig()
    going, ending = rig.add("going", 6), rig.add("ending", 6, max_tokens=1)
    going.in_flight = ending.in_flight = 1
    (row,) = rig.scheduler.schedule().rows
    assert (row.seq, row.ahead, row.start) == (going, 1, 6)


def test_model_length_ends_a_sequence_too() -> None:
    rig = Rig(max_model_len=7)
    rig.add("a", 6).in_flight = 1
    assert rig.scheduler.schedule().rows == []


def test_filled_block_becomes_a_reusable_prefix() -> None:
    rig = Rig()
    seq = rig.add("a", 8)
    (row,) = rig.scheduler.schedule().rows
    rig.scheduler.commit(row)
    assert seq.num_computed == 8
    assert rig.kv.match(seq.hashes(4, 2)) == seq.block_table
