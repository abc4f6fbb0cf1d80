"""The engine thread: take what came in, step, publish, for ever; sleeps when there is nothing to do.

Everything that changes the sequences and blocks of an engine happens on this thread. Other threads only put into its
inbox; what it publishes is handed out as immutable values.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvbaton.cluster.host.inbox import AuditWanted, Inbox, InboxLimits, SnapshotWanted, Stop
from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.kv.block_owners import BlockAudit
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.orders import Notice
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineLoad

log = logging.getLogger(__name__)

WAKE_S = 1.0  # how long an idle loop sleeps before it looks at timeouts


class StepSink(Protocol):
    """Where the engine thread leaves what others should know. Called on that thread; must not block."""

    def stepped(self, outputs: dict[int, list[TokenOutput]], load: EngineLoad) -> None: ...

    def notices(self, notices: list[tuple[int, Notice]]) -> None:
        """About migrations, by session; what `stepped` was told before is older."""
        ...

    def audited(self, audit: BlockAudit) -> None: ...

    def cached(self, events: list[CacheEvent]) -> None: ...

    def snapshot(self, snapshot: CacheSnapshot) -> None: ...

    def crashed(self, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class StepCounters:
    """Totals since the start; seconds of wall time. `model_s` is inside forward passes, sampling included, and
    `model_cpu_s` the engine thread's CPU time in them."""

    steps: int = 0
    busy_s: float = 0.0
    model_s: float = 0.0
    preemptions: int = 0
    model_cpu_s: float = 0.0


class StepLoop:
    """Runs one `Worker` on a thread of its own."""

    def __init__(
        self,
        worker: Worker,
        sink: StepSink,
        clock: Callable[[], float] = time.monotonic,
        limits: InboxLimits | None = None,
    ) -> None:
        """`limits` default to as many unread requests as the worker takes."""
        self._worker = worker
        self._sink = sink
        self._clock = clock
        self.inbox = Inbox(limits or InboxLimits(worker.max_requests))
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self._stopping = False
        self._ran = False
        self.load = worker.load(0.0)
        self.counters = StepCounters()
        self._turn_began_s: float | None = None  # None while it waits for something to do

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float | None = None) -> None:
        """Ends the thread after the step in progress, and waits for that."""
        self.inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def busy_s(self) -> float:
        """How long the turn in progress has taken so far, 0 between two. Any thread may ask: it shows a forward pass
        that does not return."""
        began_s = self._turn_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn(block=not self._ran)
        except BaseException as error:
            log.exception("engine thread died")
            self._sink.crashed(error)

    def turn(self, block: bool) -> None:
        """One round: inbox, step, publish. Tests call it themselves instead of `start`."""
        self._drain_inbox(block)
        if self._stopping:
            self._worker.settle()  # nothing may compute in memory that is about to go
            return
        self._step()
        self._turn_began_s = None

    def _step(self) -> None:
        started = self._clock()
        self._ran = self._worker.step(started)
        step_s = self._clock() - started
        if self._ran:
            self._count(step_s)
        load = self._worker.load(step_s if self._ran else self.load.step_s)
        outputs = self._worker.take_outputs()
        if outputs or load != self.load:
            self.load = load
            self._sink.stepped(outputs, load)
        if notices := self._worker.take_notices():
            self._sink.notices(notices)
        if events := self._worker.cache_events():
            self._sink.cached(events)

    def _drain_inbox(self, block: bool) -> None:
        message = self.inbox.get(WAKE_S if block else 0.0)
        self._turn_began_s = self._clock()
        while message is not None:
            if isinstance(message, Stop):
                self._stopping = True
                return
            if isinstance(message, SnapshotWanted):
                self._sink.snapshot(self._worker.cache_snapshot())
            elif isinstance(message, AuditWanted):
                self._sink.audited(self._worker.audit())
            else:
                self._worker.handle(message, self._clock())
            message = self.inbox.get(0.0)

    def _count(self, step_s: float) -> None:
        total, pipeline = self.counters, self._worker.ledger.pipeline
        self.counters = StepCounters(
            steps=total.steps + 1,
            busy_s=total.busy_s + step_s,
            model_s=pipeline.model_s,
            preemptions=self._worker.decode.scheduler.num_preemptions,
            model_cpu_s=pipeline.model_cpu_s,
        )
