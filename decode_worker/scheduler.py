"""Continuous batching: every running sequence gets one token a step (Orca), preempted by recompute when blocks run out.

When the pool cannot give a running sequence its next block, the youngest running sequence gives all of its blocks back
and is computed again later from its tokens (vLLM's recompute). The oldest sequence is taken last, so it always advances
and the batch as a whole cannot stall.

A sequence whose last row has not landed is scheduled at the position behind it, except where it will end there by its
length. Where that takes blocks that are not there (`has_room`), the caller lets the row land first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.kv.kv_manager import KVManager, OutOfBlocks
from kvbaton.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The rows to run, the block copies to make first (source, destination), and who had to give way."""

    rows: list[ScheduledRow]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]


class DecodeScheduler:
    """Owns the sequences that decode, oldest arrival first."""

    def __init__(self, kv: KVManager, max_running: int, max_model_len: int) -> None:
        self._kv = kv
        self.max_running = max_running
        self._max_model_len = max_model_len
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Admit a sequence with exactly one uncomputed token; it decodes from the next step on."""
        if seq.status is not Status.RUNNING:
            seq.to(Status.RUNNING)
        at = len(self.running)
        while at and self.running[at - 1].arrival_s > seq.arrival_s:
            at -= 1
        self.running.insert(at, seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence; the caller frees its blocks."""
        self.running.remove(seq)

    def has_room(self) -> bool:
        """Whether the next step has a slot for everybody, without anybody giving way."""
        room = self._kv.available
        return room >= len(self.running) or room >= sum(map(self._takes_block, self.running))

    def schedule(self) -> DecodePlan:
        """One row per running sequence that has, or can be given, the slot that its next token needs."""
        rows: list[ScheduledRow] = []
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        at = 0
        while at < len(self.running):
            seq = self.running[at]
            if at < self.max_running and self._goes_on(seq) and self._make_room(seq, copies, preempted):
                rows.append(ScheduledRow(seq, 1, seq.samples, seq.in_flight))
            at += 1
        return DecodePlan(rows, copies, preempted)

    def commit(self, row: ScheduledRow) -> None:
        """Account for an executed row: its token's KV is in the pool; a block that it filled becomes reusable."""
        seq, size = row.seq, self._kv.block_size
        seq.num_computed += 1
        if seq.num_computed % size == 0:
            full = seq.num_computed // size
            self._kv.commit(seq.hashes(size, full), seq.block_table[:full])

    def _goes_on(self, seq: Sequence) -> bool:
        return not seq.in_flight or not seq.ends_by_length(seq.in_flight, self._max_model_len)

    def _takes_block(self, seq: Sequence) -> bool:
        block, offset = divmod(seq.num_scheduled, self._kv.block_size)
        if block == len(seq.block_table):
            return True
        return offset > 0 and not self._kv.is_private(seq.block_table[block])

    def _make_room(self, seq: Sequence, copies: list[tuple[int, int]], preempted: list[Sequence]) -> bool:
        """Make the slot of the next token private to `seq`; False when `seq` itself had to give way."""
        while True:
            try:
                self._next_slot(seq, copies)
                return True
            except OutOfBlocks:
                victim = self.running.pop()  # the youngest; not scheduled yet, as rows are made oldest first
                self._preempt(victim)
                preempted.append(victim)
                if victim is seq:
                    return False

    def _next_slot(self, seq: Sequence, copies: list[tuple[int, int]]) -> None:
        block, offset = divmod(seq.num_scheduled, self._kv.block_size)
        if block == len(seq.block_table):
            seq.block_table.extend(self._kv.allocate(1))
        elif offset:
            private, copy = self._kv.make_writable(seq.block_table[block])
            seq.block_table[block] = private
            if copy is not None:
                copies.append(copy)

    def _preempt(self, seq: Sequence) -> None:
        if seq.in_flight:
            raise RuntimeError(f"request {seq.request.request_id} gives way with a row on its way")
        self._kv.free(seq.block_table)
        seq.num_computed = 0
        seq.to(Status.PREEMPTED)
        self.num_preemptions += 1
