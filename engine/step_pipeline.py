"""The step that the device computes while the host schedules the next one. Where steps are not pipelined it is empty
between two of them.

    scheduled without the tokens of step n     launch(n + 1)
    the device computes n + 1                  step n lands: its tokens are published, what ends with them ends
    scheduled without the tokens of n + 1      launch(n + 2)

A sequence that ended at step n may have a row in step n + 1, which reads and writes its blocks: the row is dropped when
it lands, and the blocks are given back then, not before.

A step that cannot be scheduled without the last tokens waits until they have landed (`DecodeWorker.may_lag`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from kvbaton.engine.batch import Pending, SampledToken, ScheduledRow
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.pending import PromptLogprobs
from kvbaton.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class LandedRow:
    """What came of one row whose sequence still wants it."""

    row: ScheduledRow
    sampled: tuple[SampledToken, ...]
    prompt_logprobs: PromptLogprobs | None


@dataclass(frozen=True, slots=True)
class _Write:
    """Tokens `start` to `end - 1` of a block table are being written. The table is its sequence's own list."""

    table: list[int]
    start: int
    end: int


@dataclass(slots=True)
class _Flight:
    """`void` are sequences whose row was computed from a token that they did not draw."""

    rows: list[ScheduledRow]
    writes: list[_Write]
    pending: Pending
    void: set[int] = field(default_factory=set)
    parked: list[list[int]] = field(default_factory=list)  # block tables to give back once it has landed

    def __contains__(self, seq: Sequence) -> bool:
        return any(row.seq is seq for row in self.rows)


class StepEngine(Protocol):
    """What a step needs of an engine: its blocks, and a forward pass over scheduled rows. `pipelined`: a step may be
    launched before the last one was waited for."""

    kv: KVManager
    max_model_len: int
    pipelined: bool

    @property
    def vocab_size(self) -> int: ...

    def launch(self, rows: list[ScheduledRow]) -> Pending: ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None: ...


class StepPipeline:
    """At most one step is on its way, two while the first of them lands."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._kv = engine.kv
        self._flight: _Flight | None = None
        self.model_s = 0.0  # wall time in launches and waits
        self.model_cpu_s = 0.0  # and the CPU time of this thread in them

    @property
    def busy(self) -> bool:
        """A step is on its way."""
        return self._flight is not None

    def launch(self, rows: list[ScheduledRow]) -> list[LandedRow]:
        """Launch a step, then land the one before."""
        size, before = self._kv.block_size, self._flight
        writes = [_Write(row.seq.block_table, row.start, row.start + row.num_tokens) for row in rows]
        if any(len(write.table) * size < write.end for write in writes):
            raise RuntimeError("a row has no block to write to")
        started, cpu_started = time.perf_counter(), time.thread_time()
        self._flight = _Flight(rows, writes, self._engine.launch(rows))
        for row in rows:
            row.seq.in_flight += row.num_tokens
        self._took(started, cpu_started)
        return [] if before is None else self._land(before)

    def land(self) -> list[LandedRow]:
        """Wait for the step on its way, if there is one; rows of sequences that have ended meanwhile are left out."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self._land(flight)

    def free(self, seq: Sequence) -> None:
        """Free the blocks of a sequence that has ended: now, or when the step that it is in has landed."""
        if self._flight is not None and seq in self._flight:
            self._flight.parked.append(seq.block_table)
            seq.block_table = []
        else:
            self._kv.free(seq.block_table)

    def joining(self) -> int:
        """How many sequences run once the step on its way has landed, and do not yet."""
        rows = [] if self._flight is None else self._flight.rows
        return sum(len(row.samples) for row in rows if row.seq.status is Status.PREFILLING)

    def parked(self) -> list[list[int]]:
        """Block tables of sequences that have ended and whose row has not landed."""
        return [] if self._flight is None else self._flight.parked

    def written(self) -> Iterator[int]:
        """Blocks that the step on its way writes, for an audit."""
        size = self._kv.block_size
        for write in [] if self._flight is None else self._flight.writes:
            yield from write.table[write.start // size : -(-write.end // size)]

    def _land(self, flight: _Flight) -> list[LandedRow]:
        started, cpu_started = time.perf_counter(), time.thread_time()
        result = flight.pending.wait()
        self._took(started, cpu_started)
        landed = []
        for row, sampled, logprobs in zip(flight.rows, result.sampled, result.prompt_logprobs, strict=True):
            if id(row.seq) in flight.void:
                continue
            row.seq.in_flight -= row.num_tokens
            if row.seq.status is not Status.FINISHED:
                landed.append(LandedRow(row, sampled, logprobs))
        for table in flight.parked:
            self._kv.free(table)
        self._misfed([seq for i in result.redrawn if id(seq := flight.rows[i].seq) not in flight.void])
        return landed

    def _misfed(self, seqs: list[Sequence]) -> None:
        """The rows of `seqs` that are on their way read tokens that nobody drew: the sequences go on without them."""
        for seq in seqs:
            if self._flight is not None and seq in self._flight:
                self._flight.void.add(id(seq))
                seq.in_flight = 0

    def _took(self, started: float, cpu_started: float) -> None:
        self.model_s += time.perf_counter() - started
        self.model_cpu_s += time.thread_time() - cpu_started
