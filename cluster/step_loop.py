"""The engine thread: take what came in, step, publish, for ever; sleeps when there is nothing to do.

Everything that changes the sequences and blocks of an engine happens on this thread. Other threads only `put` into its
inbox; what it publishes is handed out as immutable values.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvbaton.cluster.session_types import Notice
from kvbaton.cluster.worker import Worker
from kvbaton.cluster.worker_types import Item
from kvbaton.engine.block_owners import BlockAudit
from kvbaton.engine.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineLoad

log = logging.getLogger(__name__)

WAKE_S = 1.0  # how long an idle loop sleeps before it looks at timeouts


class StepSink(Protocol):
    """Where the engine thread leaves what others should know. Called on that thread; must not block."""

    def stepped(self, outputs: dict[int, list[TokenOutput]], load: EngineLoad) -> None: ...

    def notices(self, notices: list[tuple[int, Notice]]) -> None:
        """About moves, by session; what `stepped` was told before is older."""
        ...

    def audited(self, audit: BlockAudit) -> None: ...

    def cached(self, events: list[CacheEvent]) -> None: ...

    def snapshot(self, snapshot: CacheSnapshot) -> None: ...

    def crashed(self, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class _Stop:
    """Put into the inbox to end the loop."""


@dataclass(frozen=True, slots=True)
class SnapshotWanted:
    """Put into the inbox to get `StepSink.snapshot`."""


@dataclass(frozen=True, slots=True)
class AuditWanted:
    """Put into the inbox to get `StepSink.audited`."""


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

    def __init__(self, worker: Worker, sink: StepSink, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._sink = sink
        self._clock = clock
        self._inbox: queue.SimpleQueue[Item | SnapshotWanted | AuditWanted | _Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self._stopping = False
        self._ran = False
        self.load = worker.load(0.0)
        self.counters = StepCounters()
        self.last_turn_s = clock()

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Item | SnapshotWanted | AuditWanted) -> None:
        """Thread-safe; the item is applied before the next step."""
        self._inbox.put(item)

    def stop(self) -> None:
        """Ends the thread after the step in progress."""
        self._inbox.put(_Stop())
        if self._thread.is_alive():
            self._thread.join()

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
            return
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
        if notices := self._worker.outbox.take_notices():
            self._sink.notices(notices)
        if events := self._worker.kv.drain_events():
            self._sink.cached(events)
        self.last_turn_s = started

    def _drain_inbox(self, block: bool) -> None:
        try:
            item = self._inbox.get(block=block, timeout=WAKE_S)
            while True:
                if isinstance(item, _Stop):
                    self._stopping = True
                    return
                if isinstance(item, SnapshotWanted):
                    self._sink.snapshot(self._worker.kv.snapshot())
                elif isinstance(item, AuditWanted):
                    self._sink.audited(self._worker.audit())
                else:
                    self._worker.handle(item, self._clock())
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _count(self, step_s: float) -> None:
        total = self.counters
        self.counters = StepCounters(
            steps=total.steps + 1,
            busy_s=total.busy_s + step_s,
            model_s=self._worker.model_s,
            preemptions=self._worker.decode.num_preemptions,
            model_cpu_s=self._worker.model_cpu_s,
        )
