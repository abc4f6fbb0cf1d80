"""Chunked prefill: which prompt tokens run in the next step (Sarathi's token budget over a paged, cached prefix).

A prompt starts when the pool has blocks for all of it, so one that has started never waits for memory and always ends:
there is no order of arrivals in which two half-computed prompts wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.config import MAX_REGENERATED, BatchConfig
from kvbaton.engine.kv.kv_manager import KVManager, OutOfBlocks
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.prefill_worker.queue import HoldLimit, PrefillQueue


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The rows to run. `started` have been given their blocks, and their first chunk is among the rows."""

    rows: list[ScheduledRow]
    started: list[Sequence]


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """What one executed row did: `full_blocks` of the prompt are complete, and whether the prompt is."""

    full_blocks: int
    done: bool


class PrefillScheduler:
    """Owns the sequences that have prompt tokens left; who runs a step calls schedule, runs, then calls commit."""

    def __init__(self, kv: KVManager, limits: BatchConfig, holds: HoldLimit) -> None:
        """`holds` is asked for each prompt for another engine; those behind one that may not start can."""
        self._kv = kv
        self._chunk_tokens = limits.chunk_tokens
        self._holds = holds
        self.queue = PrefillQueue()

    def add(self, seq: Sequence, for_peer: bool = False) -> None:
        """Queue a WAITING or PREEMPTED sequence, which holds no blocks."""
        self.queue.add(seq, for_peer)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence (abort). Its blocks stay with it: the caller frees them."""
        self.queue.remove(seq)

    def schedule(self, budget_tokens: int, now: float) -> PrefillPlan:
        """Rows of at most `budget_tokens` tokens together, `MAX_REGENERATED` of them past their prompts, most urgent
        prompts first."""
        plan = PrefillPlan([], [])
        room, regenerated = True, MAX_REGENERATED
        for seq in self.queue.ordered(now):
            if budget_tokens <= 0 or regenerated <= 0:
                break
            if seq.in_flight == seq.num_uncomputed:
                continue  # its last chunk is on its way
            if seq.status is not Status.PREFILLING:
                if not self._may_start(seq):
                    continue
                room = room and self._start(seq)  # after the first that finds no room nobody else starts
                if not room:
                    continue
                plan.started.append(seq)
            left = seq.num_uncomputed - seq.in_flight
            prompt_left = max(0, seq.num_prompt - seq.num_scheduled)
            take = min(left, self._chunk_tokens, budget_tokens, prompt_left + regenerated)
            regenerated -= max(0, take - prompt_left)
            plan.rows.append(ScheduledRow(seq, take, seq.samples if take == left else (), seq.in_flight))
            budget_tokens -= take
        return plan

    def commit(self, row: ScheduledRow) -> PrefillProgress:
        """Account for an executed row: its full blocks become reusable prefixes; a finished prompt leaves the queue."""
        seq, size = row.seq, self._kv.block_size
        seq.num_computed += row.num_tokens
        full = seq.num_computed // size
        self._kv.commit(seq.hashes(size, full), seq.block_table[:full])
        done = seq.num_uncomputed == 0
        if done:
            self.queue.remove(seq)
        return PrefillProgress(full, done)

    def _may_start(self, seq: Sequence) -> bool:
        return not self.queue.for_peer(seq) or self._holds.admits(self._blocks_needed(seq))

    def _blocks_needed(self, seq: Sequence) -> int:
        return -(-len(seq.tokens) // self._kv.block_size)

    def _start(self, seq: Sequence) -> bool:
        """Give `seq` its cached prefix and fresh blocks for the rest; False (nothing taken) when there is no room."""
        cached = self._match(seq)
        try:
            fresh = self._kv.allocate(self._blocks_needed(seq) - len(cached))
        except OutOfBlocks:
            self._kv.release(cached)
            return False
        seq.block_table = cached + fresh
        seq.num_computed = len(cached) * self._kv.block_size
        seq.cached_tokens = seq.num_computed
        seq.to(Status.PREFILLING)
        if self.queue.for_peer(seq):
            self._holds.took(len(seq.block_table))
        return True

    def _match(self, seq: Sequence) -> list[int]:
        """Held blocks of the longest cached prefix that leaves a token to compute, whose logits give the next one."""
        if seq.sampling.prompt_logprobs is not None and not seq.request.emitted:
            return []  # every prompt row's logits are wanted
        size = self._kv.block_size
        return self._kv.match(seq.hashes(size, (len(seq.tokens) - 1) // size))
