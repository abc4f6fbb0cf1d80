"""Decode steps as an engine runs them, with the worker's scheduling and publishing: how long the device idles.

Each step waited for before the next is scheduled, and overlapping. What a step takes beyond the device's own work is
the gap: launches, the host between two steps, and the way of the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NoReturn

from gpucheck.results import OverlapResult, Skipped
from gpucheck.rig import Rig
from gpucheck.timing import WARM_UP, Clock

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.batch import BatchLayout, Pending, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.cuda_graphs import Bucket
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import Abort, LegKind, Submit
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.engine.sampling.sampler import Draw
from kvbaton.engine.sequence import Sequence

SESSION = 1
MAX_STEPS = 64


class RigEngine:
    """Satisfies `StepEngine` over a rig: its runner, and books of their own for its pool."""

    def __init__(self, rig: Rig, pipelined: bool) -> None:
        self._rig = rig
        self.kv = KVManager(rig.num_blocks, rig.block_size, prefix_cache=False)
        self.max_model_len = rig.capacity_tokens
        self.vocab_size = rig.config.vocab_size
        self.pipelined = pipelined

    def launch(self, rows: list[ScheduledRow]) -> Pending:
        return self._rig.runner.launch(rows)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> NoReturn:
        raise RuntimeError(f"{len(pairs)} copies where nothing is shared")


def overlap(
    rig: Rig, name: str, batches: tuple[int, ...], context: int, clock: Clock
) -> Iterator[OverlapResult | Skipped]:
    """Seconds a step over `clock.reps` steps of a growing context, both ways in turn."""
    steps = min(clock.reps, MAX_STEPS)
    for batch in batches:
        rows = rig.decode_rows(batch, context + 2 * (WARM_UP + steps))
        if rows is None:
            yield Skipped(f"{name} overlapping steps {batch} x {context}", "the KV does not fit")
            continue
        busy_s = _device_s(rig, rows, clock)
        alone_s, overlapped_s = (_step_s(rig, batch, context, steps, clock, way) for way in (False, True))
        yield OverlapResult(name, batch, context, busy_s, alone_s, overlapped_s)


def _device_s(rig: Rig, rows: list[ScheduledRow], clock: Clock) -> float:
    """What the device itself does in a step: the graph, the logits, the draws."""
    rig.runner.run(rows)
    replay = rig.captured(rows).replay
    hidden = rig.graphs.forward(rows, _bucket(rig, rows), rig.runner._feed)
    draws = [Draw(row.seq, 0, i) for i, row in enumerate(rows)]
    sampler = DeviceSampler(rig.device)
    return clock.device_s(replay) + clock.device_s(lambda: sampler.start(rig.decoder.logits(hidden), draws))


def _step_s(rig: Rig, batch: int, context: int, steps: int, clock: Clock, pipelined: bool) -> float:
    worker = Worker(RigEngine(rig, pipelined), None, BatchConfig(max_running=batch))  # type: ignore[arg-type]
    for i in range(batch):
        _admit(worker, rig, f"r{i}", context, i)
    for _ in range(WARM_UP):
        worker.step(0.0)
    worker.take_outputs()
    clock.settle()
    began = time.perf_counter()
    for _ in range(steps):
        worker.step(0.0)
        worker.take_outputs()
    clock.settle()
    seconds = (time.perf_counter() - began) / steps
    worker.handle(Abort(SESSION, None), 0.0)
    worker.settle()
    return seconds


def _admit(worker: Worker, rig: Rig, name: str, context: int, salt: int) -> None:
    """A greedy sequence that decodes, whose KV is what lies in the pool."""
    prompt = tuple(7 + (salt * 31 + n) % 200 for n in range(context + 1))
    sampling = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
    request = Request(name, prompt[:-1], sampling, emitted=prompt[-1:])
    seq = Sequence(request, 0.0)
    seq.num_computed = context
    seq.block_table = worker.ledger.kv.allocate(-(-(context + 1) // rig.block_size))
    leg = Leg(SESSION, Submit(request, LegKind.LOCAL))
    leg.live[0] = seq
    worker.ledger.legs.add(leg)
    worker.decode.scheduler.add(seq)


def _bucket(rig: Rig, rows: list[ScheduledRow]) -> Bucket:
    bucket = rig.graphs.bucket(rows, BatchLayout.of(rows))
    if bucket is None:
        raise ValueError(f"no graph holds {len(rows)} rows")
    return bucket
