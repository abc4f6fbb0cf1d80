"""The numbers of a run from records made by hand, against values worked out on paper."""

from __future__ import annotations

import pytest

from kvbaton.cluster.bench.metrics import ErrorCount, Slo, Spread, parse_slo, peak_in_flight, summarize
from kvbaton.cluster.bench.record import INTERRUPTED, Failure, RequestRecord, Timeline


def record(
    index: int,
    scheduled_s: float,
    tokens_s: tuple[float, ...],
    *,
    sent_s: float | None = None,
    failure: Failure | None = None,
    cached: int | None = None,
    asked: int | None = None,
) -> RequestRecord:
    sent_s = scheduled_s if sent_s is None else sent_s
    ended_s = tokens_s[-1] if tokens_s else sent_s
    return RequestRecord(
        index=index,
        timeline=Timeline(scheduled_s, sent_s, ended_s, tokens_s),
        input_tokens=100,
        output_tokens=len(tokens_s),
        asked_tokens=len(tokens_s) if asked is None else asked,
        cached_tokens=cached,
        exact_tokens=True,
        failure=failure,
    )


def test_a_small_run_adds_up() -> None:
    """Guards each definition of the summary at once."""
    records = [
        record(0, 1.0, (1.5, 1.6, 1.8), cached=64),
        record(1, 2.0, (2.2,), sent_s=2.1, cached=0, asked=5),
        record(2, 3.0, (), failure=Failure("http 503", "first")),
        record(3, 3.5, (), failure=Failure("http 503", "second")),
        record(4, 4.0, (6.0,), failure=Failure(INTERRUPTED, "")),
    ]
    summary = summarize(records, Slo(ttft=0.3, tpot=0.01))
    assert (summary.completed, summary.failed, summary.interrupted) == (2, 2, 1)
    assert summary.duration_s == 5.0
    assert summary.errors == (ErrorCount("http 503", 2, "first"),)
    assert (summary.tokens.input, summary.tokens.output, summary.tokens.cached) == (200, 4, 64)
    assert summary.tokens.short_answers == 1
    assert summary.throughput.requests_per_s == pytest.approx(0.4)
    assert summary.throughput.output_tokens_per_s == pytest.approx(0.8)
    latency = summary.latency
    assert (latency.ttft.low, latency.ttft.high) == pytest.approx((0.2, 0.5))
    assert latency.ttft_sent.low == pytest.approx(0.1)
    assert latency.itl.count == 2
    assert latency.itl.high == pytest.approx(0.2)
    assert (latency.tpot.count, latency.tpot.mean) == (1, pytest.approx(0.15))
    assert latency.e2e.high == pytest.approx(0.8)
    assert summary.send_lag.high == pytest.approx(0.1)
    assert summary.goodput is not None
    assert summary.goodput.good == 1  # the first misses TTFT and TPOT; the one-token answer has no TPOT to miss
    assert summary.goodput.share == pytest.approx(0.25)  # a failed request was due and is not good
    assert summary.goodput.requests_per_s == pytest.approx(0.2)


def test_nothing_measured() -> None:
    """Guards a Ctrl-C before the first answer: zeros, not a division by zero."""
    summary = summarize([], Slo(ttft=1.0))
    assert (summary.completed, summary.duration_s, summary.throughput.requests_per_s) == (0, 0.0, 0.0)
    assert summary.latency.ttft == Spread()
    assert summary.goodput is not None
    assert summary.goodput.share == 0.0


def test_percentiles_interpolate() -> None:
    """Guards the percentile definition (linear, as numpy's default and vLLM's benchmark)."""
    spread = Spread.of(range(101))
    assert (spread.p50, spread.p90, spread.p99, spread.mean) == (50, 90, 99, 50)
    assert Spread.of([1.0, 2.0]).p90 == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft=0.5), True),
        (Slo(ttft=0.49), False),
        (Slo(tpot=0.125), True),
        (Slo(tpot=0.124), False),
        (Slo(e2e=0.75), True),
        (Slo(e2e=0.74), False),
    ],
)
def test_slo_limits_are_inclusive(slo: Slo, good: bool) -> None:
    """Guards each limit alone: exactly at the limit is good."""
    assert slo.met_by(record(0, 0.0, (0.5, 0.625, 0.75))) is good


def test_ttft_in_the_slo_counts_from_the_schedule() -> None:
    """Guards goodput against coordinated omission: fast after a late send is still late."""
    assert not Slo(ttft=0.5).met_by(record(0, 0.0, (2.1,), sent_s=2.0))


def test_slo_text() -> None:
    """Guards the form on the command line."""
    assert parse_slo("ttft=0.5,tpot=0.05") == Slo(0.5, 0.05, None)
    assert parse_slo("e2e=10") == Slo(e2e=10.0)
    for bad in ("ttft", "itl=3", "ttft=0", "ttft=-1", "ttft=fast", ""):
        with pytest.raises(ValueError, match=r"SLO|float"):
            parse_slo(bad)


def test_peak_in_flight_counts_overlap_only() -> None:
    """Guards the sweep: an end and a start in the same moment do not overlap."""
    records = [record(0, 0.0, (2.0,)), record(1, 2.0, (3.0,)), record(2, 2.5, (2.6,))]
    assert peak_in_flight(records) == 2
    assert peak_in_flight([]) == 0


def test_mixed_streams_are_called_chunks() -> None:
    """Guards the label: one reply without token ids makes the gaps of the run gaps between chunks."""
    plain = record(0, 0.0, (1.0, 2.0))
    vague = RequestRecord(1, plain.timeline, 1, 5, 5, exact_tokens=False)
    assert summarize([plain], None).latency.itl_per_token
    assert not summarize([plain, vague], None).latency.itl_per_token
    assert vague.tpot_s == pytest.approx(0.25)  # usage says 5 tokens in the second between first and last chunk
