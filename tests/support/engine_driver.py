"""Drives an `Engine` step by step without a scheduler: each call says which rows run."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from kvbaton.engine.batch import ScheduledRow, StepResult
from kvbaton.engine.engine import Engine
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence


class EngineDriver:
    """Gives blocks to sequences, runs the rows asked for, and appends what was drawn."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seqs: list[Sequence] = []

    def add(self, prompt: Seq[int], name: str = "r", samples: tuple[int, ...] = (0,), **sampling: Any) -> Sequence:
        """A sequence with blocks for its prompt; greedy unless told otherwise."""
        values: dict[str, Any] = {"max_tokens": 1000, "temperature": 0.0, **sampling}
        seq = Sequence(Request(name, tuple(prompt), SamplingParams(**values), samples), 0.0)
        seq.block_table = self.engine.kv.allocate(-(-len(prompt) // self.engine.kv.block_size))
        self.seqs.append(seq)
        return seq

    def step(self, *chunks: tuple[Sequence, int]) -> StepResult:
        """Run `count` tokens of each sequence; those whose last token is among them draw."""
        rows = [self._row(seq, count) for seq, count in chunks]
        result = self.engine.launch(rows).wait()
        for row, drawn in zip(rows, result.sampled, strict=True):
            row.seq.num_computed += row.num_tokens
            if len(drawn) == 1:
                row.seq.tokens.append(drawn[0].token_id)
        return result

    def prefill(self, seq: Sequence, chunk: int) -> None:
        while seq.num_computed < seq.num_prompt:
            self.step((seq, min(chunk, seq.num_prompt - seq.num_computed)))

    def decode(self, num_outputs: int, *seqs: Sequence) -> None:
        """All of `seqs` in one batch, a token a step, until each has that many output tokens."""
        while running := [seq for seq in seqs if seq.num_outputs < num_outputs]:
            self.step(*((seq, 1) for seq in running))

    def finish(self) -> None:
        """Give everything back; every block must be there."""
        for seq in self.seqs:
            self.engine.kv.release(seq.block_table)
        self.engine.kv.check()
        assert self.engine.kv.counts().held == 0

    def _row(self, seq: Sequence, count: int) -> ScheduledRow:
        end = seq.num_computed + count
        missing = -(-end // self.engine.kv.block_size) - len(seq.block_table)
        seq.block_table.extend(self.engine.kv.allocate(max(missing, 0)))
        return ScheduledRow(seq, count, seq.samples if end == len(seq.tokens) else ())


def output(seq: Sequence) -> list[int]:
    return seq.tokens[seq.num_prompt :]
