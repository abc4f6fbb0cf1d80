"""Latency and token counts of one call, written to the replica's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbaton.cluster.http.delta import Delta, Usage
from kvbaton.cluster.http.metrics import HttpMetrics


class CallTimer:
    """Starts when it is made: once the request has been read and checked."""

    __slots__ = ("_clock", "_closed", "_last_s", "_metrics", "_started_s", "_tokens")

    def __init__(self, metrics: HttpMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._started_s = clock()
        self._last_s: float | None = None
        self._tokens = 0
        self._closed = False

    def arrived(self, deltas: Sequence[Delta]) -> None:
        now = self._clock()
        if self._last_s is None:
            self._metrics.ttft.observe(now - self._started_s)
        else:
            self._metrics.itl.observe(now - self._last_s)
        self._last_s = now
        self._tokens += len(deltas)
        for delta in deltas:
            if delta.finish is not None:
                self._metrics.finished.labels(delta.finish.value).inc()

    def finished(self, usage: Usage) -> None:
        """Every sample is complete."""
        self._metrics.e2e.observe(self._clock() - self._started_s)
        self._metrics.prompt_tokens.inc(usage.prompt)
        self._metrics.cached_tokens.inc(usage.cached)

    def closed(self, unfinished: int) -> None:
        """The call is over, with `unfinished` samples that nobody waits for any more. Counts once."""
        if self._closed:
            return
        self._closed = True
        self._metrics.generated_tokens.inc(self._tokens)
        if unfinished:
            self._metrics.finished.labels("abandoned").inc(unfinished)
