"""What the records of a run add up to: latency distributions, throughput, goodput, errors by kind.

TTFT and E2E count from the scheduled arrival (see `runner`); `ttft_sent` counts from the moment of sending. TPOT is one
value a request (mean gap after the first token), ITL one a gap. Latencies are those of completed requests only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbaton.cluster.bench.record import RequestRecord


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in seconds. `count` 0 means that nothing was measured and the other fields are 0."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        data = np.fromiter(values, dtype=np.float64)
        if not data.size:
            return Spread()
        p50, p90, p99 = (float(value) for value in np.percentile(data, (50, 90, 99)))
        return Spread(data.size, float(data.mean()), p50, p90, p99, float(data.min()), float(data.max()))


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency limits in seconds; a limit that is None is not asked for."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """Did a completed request keep every limit? An answer of one token has no TPOT to miss."""
        tpot_s = record.tpot_s
        return not (
            (self.ttft is not None and record.ttft_s > self.ttft)
            or (self.tpot is not None and tpot_s is not None and tpot_s > self.tpot)
            or (self.e2e is not None and record.e2e_s > self.e2e)
        )


def parse_slo(text: str) -> Slo:
    """Read `ttft=0.5,tpot=0.05,e2e=10` (any of the three); raises ValueError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"SLO {part!r}: expected ttft=SECONDS, tpot=SECONDS or e2e=SECONDS")
        limits[name] = float(value)
        if limits[name] <= 0:
            raise ValueError(f"SLO {part!r}: the limit must be above 0")
    return Slo(**limits)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Completed requests that met the SLO: how many, which share of all that were due, and how many a second."""

    slo: Slo
    good: int
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class ErrorCount:
    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token totals of completed requests. `cached` is None where the server does not report it."""

    input: int
    output: int
    cached: int | None
    short_answers: int  # completed with fewer tokens than asked for


@dataclass(frozen=True, slots=True)
class Latency:
    ttft: Spread
    ttft_sent: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    itl_per_token: bool  # False: a gap is between chunks, because chunks did not name their tokens


@dataclass(frozen=True, slots=True)
class Throughput:
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers. `duration_s` is from the first arrival to the last end."""

    duration_s: float
    completed: int
    failed: int
    interrupted: int
    peak_in_flight: int
    send_lag: Spread
    errors: tuple[ErrorCount, ...]
    tokens: Tokens
    throughput: Throughput
    latency: Latency
    goodput: Goodput | None


def summarize(records: Sequence[RequestRecord], slo: Slo | None) -> Summary:
    """Numbers of a run, finished or not; `records` may be empty."""
    done = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok and not record.interrupted]
    duration_s = _duration(records)
    tokens = _tokens(done)
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=len(failed),
        interrupted=len(records) - len(done) - len(failed),
        peak_in_flight=peak_in_flight(records),
        send_lag=Spread.of(record.timeline.sent_s - record.timeline.scheduled_s for record in records),
        errors=_errors(failed),
        tokens=tokens,
        throughput=Throughput(
            _rate(len(done), duration_s), _rate(tokens.input, duration_s), _rate(tokens.output, duration_s)
        ),
        latency=_latency(done),
        goodput=_goodput(done, len(done) + len(failed), duration_s, slo),
    )


def peak_in_flight(records: Iterable[RequestRecord]) -> int:
    """The most requests that were under way at one moment."""
    changes = [(record.timeline.sent_s, 1) for record in records]
    changes += [(record.timeline.ended_s, -1) for record in records]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


def _duration(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    first_s = min(record.timeline.scheduled_s for record in records)
    return max(record.timeline.ended_s for record in records) - first_s


def _rate(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _tokens(done: Sequence[RequestRecord]) -> Tokens:
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    return Tokens(
        input=sum(record.input_tokens for record in done),
        output=sum(record.output_tokens for record in done),
        cached=sum(cached) if cached else None,
        short_answers=sum(record.output_tokens < record.asked_tokens for record in done),
    )


def _latency(done: Sequence[RequestRecord]) -> Latency:
    return Latency(
        ttft=Spread.of(record.ttft_s for record in done),
        ttft_sent=Spread.of(record.ttft_sent_s for record in done),
        tpot=Spread.of(tpot for record in done if (tpot := record.tpot_s) is not None),
        itl=Spread.of(gap for record in done for gap in record.itl_s),
        e2e=Spread.of(record.e2e_s for record in done),
        itl_per_token=all(record.exact_tokens for record in done),
    )


def _errors(failed: Sequence[RequestRecord]) -> tuple[ErrorCount, ...]:
    failures = [record.failure for record in failed if record.failure is not None]
    examples = {failure.kind: failure.message for failure in reversed(failures)}
    counts = Counter(failure.kind for failure in failures)
    return tuple(ErrorCount(kind, count, examples[kind]) for kind, count in counts.most_common())


def _goodput(done: Sequence[RequestRecord], due: int, duration_s: float, slo: Slo | None) -> Goodput | None:
    if slo is None:
        return None
    good = sum(slo.met_by(record) for record in done)
    return Goodput(slo, good, good / due if due else 0.0, _rate(good, duration_s))
