"""The step on its way: what lands when, whose blocks wait for it, and rows that read what nobody drew."""

from __future__ import annotations

import pytest

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import LandedRow, StepPipeline
from support.toy_engine import PipelinedToyEngine, expected_tokens
from support.worker_bench import prompt_of, request


class Rig:
    def __init__(self, left_to_host: int = 0) -> None:
        self.engine = PipelinedToyEngine(16)
        self.engine.left_to_host = left_to_host
        self.kv = self.engine.kv
        self.pipeline = StepPipeline(self.engine)

    def prompt(self, tokens: int, name: str = "a") -> Sequence:
        seq = Sequence(request(name, prompt_of(tokens)), 0.0)
        seq.to(Status.PREFILLING)
        seq.block_table = self.kv.allocate(-(-tokens // 4) + 1)
        return seq

    def launch(self, seq: Sequence, tokens: int, draws: bool = False) -> list[LandedRow]:
        return self.pipeline.launch([ScheduledRow(seq, tokens, (0,) if draws else (), seq.in_flight)])

    def take(self, landed: list[LandedRow]) -> list[int]:
        """Account for what has landed, as a scheduler does; the tokens."""
        for one in landed:
            one.row.seq.num_computed += one.row.num_tokens
            one.row.seq.tokens.extend(token.token_id for token in one.sampled)
        return [token.token_id for one in landed for token in one.sampled]


def test_one_step_lands_when_the_next_is_launched() -> None:
    r = Rig()
    seq = r.prompt(10)
    assert r.launch(seq, 6) == []
    assert (seq.in_flight, r.pipeline.busy) == (6, True)
    (first,) = r.launch(seq, 4, draws=True)
    assert (first.row.num_tokens, first.sampled, seq.in_flight) == (6, (), 4)
    r.take([first])
    assert r.take(r.pipeline.land()) == expected_tokens(prompt_of(10), 1)
    assert (seq.in_flight, r.pipeline.busy, r.pipeline.land()) == (0, False, [])


def test_row_without_a_block_to_write_to_is_not_launched() -> None:
    """Guards the pool from a scheduler that miscounts."""
    r = Rig()
    seq = r.prompt(10)
    del seq.block_table[2:]
    with pytest.raises(RuntimeError, match="no block to write to"):
        r.launch(seq, 10)
    assert (seq.in_flight, r.pipeline.busy) == (0, False)


def test_blocks_of_one_that_ended_are_freed_when_its_row_has_landed() -> None:
    r = Rig()
    seq = r.prompt(6)
    table = list(seq.block_table)
    r.launch(seq, 6, draws=True)
    seq.to(Status.FINISHED)
    r.pipeline.free(seq)
    assert (seq.block_table, r.pipeline.parked(), r.kv.counts().held) == ([], [table], 3)
    assert sorted(r.pipeline.written()) == sorted(table[:2])
    assert r.pipeline.land() == [], "nobody wants the row"
    assert r.kv.counts().held == 0


def test_blocks_of_one_without_a_row_are_freed_at_once() -> None:
    r = Rig()
    running, other = r.prompt(6), r.prompt(6, "b")
    r.launch(running, 6)
    r.pipeline.free(other)
    assert (r.pipeline.parked(), r.kv.counts().held) == ([], 3)


def test_prompts_that_end_with_this_step_join_the_batch() -> None:
    r = Rig()
    seq, inner = r.prompt(6), r.prompt(9, "b")
    r.pipeline.launch([ScheduledRow(seq, 6, (0,)), ScheduledRow(inner, 4, ())])
    assert r.pipeline.joining() == 1
    r.pipeline.land()
    assert r.pipeline.joining() == 0


def test_row_on_top_of_a_draw_left_to_the_host_is_void() -> None:
    """What it read is no token; its sequence is scheduled as if it had not been there."""
    r = Rig(left_to_host=1)  # every draw
    seq = r.prompt(6)
    r.launch(seq, 6, draws=True)
    seq.to(Status.RUNNING)
    drawn = r.take(r.launch(seq, 1, draws=True))
    assert (drawn, seq.in_flight) == (expected_tokens(prompt_of(6), 1), 0)
    assert r.pipeline.land() == []
    assert seq.in_flight == 0


def test_time_in_the_model_is_counted() -> None:
    r = Rig()
    r.launch(r.prompt(6), 6)
    launched_s = r.pipeline.model_s
    r.pipeline.land()
    assert r.pipeline.model_s > launched_s > 0
    assert r.pipeline.model_cpu_s > 0
