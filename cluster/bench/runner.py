"""Sends a planned load: an open loop by the clock, or a closed loop by completions. Can be stopped at any time.

    open loop     wait for the arrival -> send, however many are under way (with `max_in_flight`: wait for a slot)
    closed loop   each of `concurrency` workers sends the next request when its last one has ended

An open loop keeps the scheduled arrival of every request, so a server that stalls cannot hide the requests that would
have come meanwhile (coordinated omission): latency counts from the schedule, and the client's own delays show up in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Protocol

from kvbaton.cluster.bench.client import Job
from kvbaton.cluster.bench.record import RequestRecord
from kvbaton.cluster.bench.workload import PlannedRequest

Encode = Callable[[PlannedRequest], bytes]


class Pacer(Protocol):
    """The run's clock, in seconds since its start."""

    def now(self) -> float: ...

    async def wait_until(self, moment_s: float) -> None: ...


class WallPacer:
    """Real time, counted from construction."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def wait_until(self, moment_s: float) -> None:
        left_s = moment_s - self.now()
        if left_s > 0:
            await asyncio.sleep(left_s)
            await self.wait_until(moment_s)  # the loop's timer may fire a fraction of a millisecond early


class JobRunner(Protocol):
    async def run(self, job: Job) -> RequestRecord: ...


class Observer(Protocol):
    """Told of every request that starts and ends; the progress display."""

    def started(self) -> None: ...

    def finished(self, record: RequestRecord) -> None: ...


class LoadRun:
    """One run. `records` grows as requests end; `stop` ends it early and keeps what there is."""

    def __init__(self, jobs: JobRunner, encode: Encode, pacer: Pacer, observer: Observer) -> None:
        self._jobs = jobs
        self._encode = encode
        self._pacer = pacer
        self._observer = observer
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self.records: list[RequestRecord] = []

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """Send nothing more and give up what is under way; those requests are recorded as interrupted."""
        self._stopped = True
        for task in (self._dispatcher, *self._tasks):
            if task is not None:
                task.cancel()

    async def open_loop(
        self, plan: Iterable[tuple[float, PlannedRequest]], max_in_flight: int | None = None
    ) -> list[RequestRecord]:
        """Send each request at its arrival time; at most `max_in_flight` at once, the wait for a slot being counted."""
        slots = asyncio.Semaphore(max_in_flight) if max_in_flight else None
        return await self._drive(self._dispatch(plan, slots))

    async def closed_loop(self, requests: Iterable[PlannedRequest], concurrency: int) -> list[RequestRecord]:
        """Keep `concurrency` requests under way until `requests` ends; each is due when it is sent."""
        return await self._drive(self._workers(iter(requests), concurrency))

    async def _drive(self, dispatch: Coroutine[Any, Any, None]) -> list[RequestRecord]:
        self._dispatcher = asyncio.ensure_future(dispatch)
        self._dispatcher.add_done_callback(self._ended)
        await asyncio.wait([self._dispatcher])
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._error is not None:
            raise self._error
        return sorted(self.records, key=lambda record: record.index)

    async def _dispatch(self, plan: Iterable[tuple[float, PlannedRequest]], slots: asyncio.Semaphore | None) -> None:
        for arrival_s, request in plan:
            body = self._encode(request)  # before the wait: a long prompt takes milliseconds to encode
            await self._pacer.wait_until(arrival_s)
            if slots is not None:
                await slots.acquire()
            self._launch(self._one(request, body, arrival_s, slots))

    async def _workers(self, requests: Iterator[PlannedRequest], concurrency: int) -> None:
        for _ in range(concurrency):
            self._launch(self._worker(requests))

    async def _worker(self, requests: Iterator[PlannedRequest]) -> None:
        for request in requests:
            body = self._encode(request)
            await self._one(request, body, self._pacer.now(), None)
            if self._stopped:
                return

    def _launch(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._error is None:
            self._error = error  # a fault of this program, not of the server: end the run and raise it there
            self.stop()

    async def _one(
        self, request: PlannedRequest, body: bytes, scheduled_s: float, slots: asyncio.Semaphore | None
    ) -> None:
        self._observer.started()
        job = Job(request.index, body, scheduled_s, request.input_tokens, request.output_tokens)
        try:
            record = await self._jobs.run(job)
        finally:
            if slots is not None:
                slots.release()
        self.records.append(record)
        self._observer.finished(record)
