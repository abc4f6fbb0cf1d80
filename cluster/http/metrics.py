"""Counters and latency histograms of one ingress replica in its own registry, and the timer with which each call fills
them. All times are seconds."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kvbaton.engine.request import FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST
_TTFT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class HttpMetrics:
    """What `/metrics` shows of the HTTP side. Whoever has more to show registers a collector with `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters()
        self._latencies()

    def _counters(self) -> None:
        registry = self.registry
        self.responses = Counter(
            "kvbaton_http_responses", "HTTP responses by route and status.", ("route", "status"), registry=registry
        )
        self.in_flight = Gauge("kvbaton_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self.finished = Counter(
            "kvbaton_http_samples_finished", "Samples by the way they ended.", ("reason",), registry=registry
        )
        self.prompt_tokens = Counter(
            "kvbaton_http_prompt_tokens", "Prompt tokens of complete calls.", registry=registry
        )
        self.cached_tokens = Counter(
            "kvbaton_http_cached_prompt_tokens", "Prompt tokens that were found in a cache.", registry=registry
        )
        self.generated_tokens = Counter(
            "kvbaton_http_generated_tokens", "Tokens sent to clients or counted for them.", registry=registry
        )

    def _latencies(self) -> None:
        registry = self.registry
        self.ttft = Histogram(
            "kvbaton_http_time_to_first_token_seconds",
            "From the parsed request to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.itl = Histogram(
            "kvbaton_http_inter_token_latency_seconds",
            "Between arrivals of tokens of one call.",
            buckets=_ITL_BUCKETS,
            registry=registry,
        )
        self.e2e = Histogram(
            "kvbaton_http_request_duration_seconds",
            "From the parsed request to its last token.",
            buckets=_E2E_BUCKETS,
            registry=registry,
        )

    def render(self) -> str:
        return generate_latest(self.registry).decode()


class CallTimer:
    """Latency and token counts of one call. Starts when it is made: once the request has been read and checked."""

    __slots__ = ("_clock", "_closed", "_last_s", "_metrics", "_started_s", "_tokens")

    def __init__(self, metrics: HttpMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._started_s = clock()
        self._last_s: float | None = None
        self._tokens = 0
        self._closed = False

    def arrived(self, tokens: int) -> None:
        """`tokens` tokens came together."""
        now = self._clock()
        if self._last_s is None:
            self._metrics.ttft.observe(now - self._started_s)
        else:
            self._metrics.itl.observe(now - self._last_s)
        self._last_s = now
        self._tokens += tokens

    def choice_ended(self, reason: FinishReason) -> None:
        self._metrics.finished.labels(reason.value).inc()

    def finished(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Every choice is complete. `cached_tokens` of the prompt tokens were not computed again."""
        self._metrics.e2e.observe(self._clock() - self._started_s)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.cached_tokens.inc(cached_tokens)

    def closed(self, unfinished: int) -> None:
        """The call is over, with `unfinished` choices that nobody waits for any more. Only the first report counts."""
        if self._closed:
            return
        self._closed = True
        self._metrics.generated_tokens.inc(self._tokens)
        if unfinished:
            self._metrics.finished.labels("abandoned").inc(unfinished)
