"""Which prompt tokens run in a step: chunks, the budget, cached prefixes, and who may begin."""

from __future__ import annotations

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.prefill_worker.queue import HoldLimit
from kvbaton.prefill_worker.scheduler import PrefillPlan, PrefillScheduler

LIMITS = BatchConfig(prefill_chunk_tokens=8, max_held_fraction=0.5)


class Rig:
    """Blocks of 4 tokens."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.kv = KVManager(num_blocks, 4, prefix_cache=True)
        self.holds = HoldLimit(num_blocks, LIMITS)
        self.scheduler = PrefillScheduler(self.kv, LIMITS, self.holds)

    def add(
        self, name: str, tokens: int, *, for_peer: bool = False, first: int = 1, arrival_s: float = 0.0
    ) -> Sequence:
        request = Request(name, tuple(range(first, first + tokens)), SamplingParams(max_tokens=9))
        seq = Sequence(request, arrival_s)
        self.scheduler.add(seq, for_peer)
        return seq

    def plan(self, budget: int = 64) -> PrefillPlan:
        return self.scheduler.schedule(budget, 0.0)

    def rows(self, budget: int = 64) -> list[tuple[str, int, tuple[int, ...]]]:
        return [(row.seq.request.request_id, row.num_tokens, row.samples) for row in self.plan(budget).rows]


def test_prompt_runs_in_chunks_and_only_the_last_draws() -> None:
    rig = Rig()
    rig.add("a", 18)
    seen = []
    while rows := rig.plan().rows:
        (row,) = rows
        seen.append((row.start, row.num_tokens, row.samples))
        progress = rig.scheduler.commit(row)
        assert progress.done == bool(row.samples)
        assert progress.full_blocks == (row.seq.num_computed // 4)
    assert seen == [(0, 8, ()), (8, 8, ()), (16, 2, (0,))]
    assert len(rig.scheduler.queue) == 0


def test_budget_is_shared_most_urgent_first() -> None:
    rig = Rig()
    rig.add("long", 12)
    rig.add("short", 5)
    assert rig.rows(budget=9) == [("short", 5, (0,)), ("long", 4, ())]
    assert rig.rows(budget=0) == []


def test_what_a_step_generates_again_is_limited() -> None:
    """Each such token has scratch of its own, as a running stream has; those of prompts do not."""
    scheduler = PrefillScheduler(KVManager(200, 4, prefix_cache=True), BatchConfig(), HoldLimit(200, BatchConfig()))
    for number, emitted in enumerate((100, 200, 50)):
        request = Request(f"r{number}", (number + 1,) * 10, SamplingParams(max_tokens=900), emitted=(7,) * emitted)
        scheduler.add(Sequence(request, 0.0))
    seen = []
    while rows := scheduler.schedule(2048, 0.0).rows:
        seen.append([(row.seq.request.request_id, row.num_tokens) for row in rows])
        for row in rows:
            scheduler.commit(row)
    assert seen == [[("r2", 60), ("r0", 110), ("r1", 116)], [("r1", 94)]]


def test_chunk_on_its_way_is_followed_by_the_next_and_the_last_is_waited_for() -> None:
    """Guards overlapping steps: nothing is computed twice."""
    rig = Rig()
    seq = rig.add("a", 12)
    (first,) = rig.plan().rows
    seq.in_flight = first.num_tokens
    (second,) = rig.plan().rows
    assert (second.ahead, second.num_tokens, second.samples) == (8, 4, (0,))
    seq.in_flight = 12
    assert rig.plan().rows == []


def test_prompt_begins_with_blocks_for_all_of_it() -> None:
    rig = Rig(num_blocks=4)
    first, second = rig.add("a", 9), rig.add("b", 8, first=50)
    plan = rig.plan()
    assert plan.started == [second], "shorter, so first; for the other too few are left"
    assert (len(second.block_table), first.status, rig.kv.counts().free) == (2, Status.WAITING, 2)


def test_nobody_overtakes_the_first_that_found_no_room() -> None:
    """Guards a large prompt from starving behind small ones that fit."""
    rig = Rig(num_blocks=4)
    held = rig.kv.allocate(2)
    large, small = rig.add("large", 12, arrival_s=-1.0), rig.add("small", 4, first=50)
    assert rig.plan() == PrefillPlan([], []), "it waited longer, and three blocks are not there"
    rig.kv.release(held)
    assert rig.plan().started == [large, small]


def test_cached_prefix_is_held_and_one_token_is_left_to_compute() -> None:
    rig = Rig()
    rig.add("a", 16)
    while rows := rig.plan().rows:
        rig.scheduler.commit(rows[0])
    again = rig.add("again", 16)
    (row,) = rig.plan().rows
    assert (again.cached_tokens, row.start, row.num_tokens) == (12, 12, 4)
    assert [rig.kv.holders(block) for block in again.block_table] == [2, 2, 2, 1]


def test_a_start_without_room_gives_the_cached_prefix_back() -> None:
    rig = Rig(num_blocks=6)
    done = rig.add("a", 8)
    rig.scheduler.commit(rig.plan().rows[0])
    rig.kv.free(done.block_table)
    rig.kv.allocate(4)
    rig.add("b", 16)
    assert rig.plan() == PrefillPlan([], [])
    assert rig.kv.counts().cached == 2


def test_prompt_logprobs_need_every_row() -> None:
    rig = Rig()
    rig.add("a", 8)
    rig.scheduler.commit(rig.plan().rows[0])
    request = Request("b", tuple(range(1, 9)), SamplingParams(max_tokens=9, prompt_logprobs=0))
    rig.scheduler.add(Sequence(request, 0.0))
    (row,) = rig.plan().rows
    assert (row.start, row.seq.cached_tokens) == (0, 0)


def test_limit_stops_prompts_for_peers_and_lets_others_by() -> None:
    rig = Rig(num_blocks=16)
    rig.holds.begin_step(1, 8)
    rig.add("peer", 4, for_peer=True)
    rig.add("local", 8, first=50)
    assert rig.rows() == [("local", 8, (0,))]


def test_limit_counts_those_that_begin_in_the_same_step() -> None:
    rig = Rig(num_blocks=16)
    rig.holds.begin_step(0, 0)
    for i in range(4):
        rig.add(f"p{i}", 12, for_peer=True, first=100 * i)
    assert [name for name, _, _ in rig.rows()] == ["p0", "p1"], "3 + 3 blocks of 8"
