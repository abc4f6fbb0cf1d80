"""Counters and latency histograms of one ingress replica, in a registry of its own. All times are seconds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_TTFT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class HttpMetrics:
    """What `/metrics` shows of the HTTP side."""

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
