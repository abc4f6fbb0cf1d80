"""Open and closed loops on a hand-moved clock: who is sent when, and what a stop leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from kvbaton.cluster.bench.client import Job
from kvbaton.cluster.bench.record import INTERRUPTED, Failure, RequestRecord, Timeline
from kvbaton.cluster.bench.runner import LoadRun
from kvbaton.cluster.bench.workload import Kind, PlannedRequest, Segment


class HandPacer:
    """Time stands at `moment_s`; waiting moves it there at once."""

    def __init__(self) -> None:
        self.moment_s = 0.0

    def now(self) -> float:
        return self.moment_s

    async def wait_until(self, moment_s: float) -> None:
        await asyncio.sleep(0)  # what was launched before starts before time moves
        self.moment_s = max(self.moment_s, moment_s)


class HeldJobs:
    """Jobs that end when the test says so."""

    def __init__(self, pacer: HandPacer) -> None:
        self._pacer = pacer
        self.sent: dict[int, float] = {}
        self.release: dict[int, asyncio.Event] = {}
        self._changed = asyncio.Condition()

    async def run(self, job: Job) -> RequestRecord:
        sent_s = self._pacer.now()
        self.release[job.index] = asyncio.Event()
        async with self._changed:
            self.sent[job.index] = sent_s
            self._changed.notify_all()
        failure = None
        try:
            await self.release[job.index].wait()
        except asyncio.CancelledError:
            failure = Failure(INTERRUPTED, "")
        now_s = self._pacer.now()
        times = Timeline(job.scheduled_s, sent_s, now_s, (now_s,))
        return RequestRecord(job.index, times, job.input_tokens, 1, job.asked_tokens, failure=failure)

    async def until_sent(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.sent) >= count)


class Counts:
    def __init__(self) -> None:
        self.under_way = 0
        self.peak = 0

    def started(self) -> None:
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)

    def finished(self, record: RequestRecord) -> None:
        self.under_way -= 1


class Bench:
    """A run with its hand-moved surroundings."""

    def __init__(self) -> None:
        self.pacer = HandPacer()
        self.jobs = HeldJobs(self.pacer)
        self.counts = Counts()
        self.run = LoadRun(self.jobs, lambda request: b"", self.pacer, self.counts)


def requests(count: int) -> list[PlannedRequest]:
    return [PlannedRequest(index, (Segment(Kind.OWN, index, 5),), 7) for index in range(count)]


def plan(arrivals: Iterable[float]) -> list[tuple[float, PlannedRequest]]:
    moments = list(arrivals)
    return list(zip(moments, requests(len(moments)), strict=True))


async def test_open_loop_sends_on_schedule_whatever_is_under_way() -> None:
    """Guards the open loop: nothing has ended, and yet every request leaves at its time."""
    bench = Bench()
    running = asyncio.ensure_future(bench.run.open_loop(plan([0.5, 1.0, 4.0])))
    await bench.jobs.until_sent(3)
    assert bench.jobs.sent == {0: 0.5, 1: 1.0, 2: 4.0}
    bench.pacer.moment_s = 9.0
    for event in bench.jobs.release.values():
        event.set()
    records = await running
    assert [record.index for record in records] == [0, 1, 2]
    assert [record.ttft_s for record in records] == [8.5, 8.0, 5.0]
    assert (bench.counts.peak, bench.counts.under_way) == (3, 0)


async def test_a_held_back_request_counts_from_its_schedule() -> None:
    """Guards against coordinated omission: the second request was due at 1 and could be sent only at 6."""
    bench = Bench()
    running = asyncio.ensure_future(bench.run.open_loop(plan([0.0, 1.0]), max_in_flight=1))
    await bench.jobs.until_sent(1)
    bench.pacer.moment_s = 6.0
    bench.jobs.release[0].set()
    await bench.jobs.until_sent(2)
    bench.pacer.moment_s = 8.0
    bench.jobs.release[1].set()
    _, second = await running
    assert second.timeline.scheduled_s == 1.0
    assert second.timeline.sent_s == 6.0
    assert (second.ttft_s, second.ttft_sent_s) == (7.0, 2.0)
    assert bench.counts.peak == 1


async def test_closed_loop_keeps_its_width() -> None:
    """Guards concurrency: two at once, the third only when one has ended, and it is due when it is sent."""
    bench = Bench()
    running = asyncio.ensure_future(bench.run.closed_loop(requests(3), 2))
    await bench.jobs.until_sent(2)
    assert set(bench.jobs.sent) == {0, 1}
    bench.pacer.moment_s = 3.0
    bench.jobs.release[1].set()
    await bench.jobs.until_sent(3)
    bench.jobs.release[0].set()
    bench.jobs.release[2].set()
    records = await running
    assert [record.timeline.scheduled_s for record in records] == [0.0, 0.0, 3.0]
    assert bench.counts.peak == 2


@pytest.mark.parametrize("closed", [True, False])
async def test_stop_keeps_what_there_is(closed: bool) -> None:
    """Guards Ctrl-C: finished requests stay, those under way are interrupted, nothing more is sent."""
    bench = Bench()
    work = bench.run.closed_loop(requests(9), 2) if closed else bench.run.open_loop(plan(range(9)), max_in_flight=2)
    running = asyncio.ensure_future(work)
    await bench.jobs.until_sent(2)
    bench.jobs.release[0].set()
    await bench.jobs.until_sent(3)
    bench.run.stop()
    records = await running
    assert bench.run.stopped
    assert {record.index: record.interrupted for record in records} == {0: False, 1: True, 2: True}
    assert len(bench.jobs.sent) == 3
    assert bench.counts.under_way == 0


async def test_a_failing_encoder_ends_the_run() -> None:
    """Guards against a run that waits for ever because its dispatcher died in silence."""
    bench = Bench()

    def broken(request: PlannedRequest) -> bytes:
        raise ValueError("cannot encode")

    for closed in (True, False):
        run = LoadRun(bench.jobs, broken, bench.pacer, bench.counts)
        work = run.closed_loop(requests(2), 2) if closed else run.open_loop(plan([0.0]))
        with pytest.raises(ValueError, match="cannot encode"):
            await work
