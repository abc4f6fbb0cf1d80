"""Guards what is measured of a link: only time with sends running counts, and a slow link is reported once."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.stats import MIN_SAMPLE_BYTES, LinkMeter, Traffic


def send(meter: LinkMeter, since: float, until: float) -> None:
    meter.on_posted(since)
    meter.on_sent(MIN_SAMPLE_BYTES, until, idle=True)


def test_idle_time_is_not_taken_for_a_slow_link() -> None:
    meter = LinkMeter()
    assert meter.bandwidth_bytes_s is None
    send(meter, 0.0, 2.0)
    send(meter, 100.0, 102.0)
    assert meter.bandwidth_bytes_s == MIN_SAMPLE_BYTES / 2
    assert meter.bytes_sent == 2 * MIN_SAMPLE_BYTES


def test_too_few_bytes_are_no_sample() -> None:
    meter = LinkMeter()
    meter.on_posted(0.0)
    meter.on_sent(MIN_SAMPLE_BYTES - 1, 1.0, idle=True)
    assert meter.bandwidth_bytes_s is None


def test_a_slow_link_is_reported_when_it_becomes_slow_and_again_after_it_was_fast() -> None:
    meter, floor = LinkMeter(), MIN_SAMPLE_BYTES
    said = []
    for seconds in (0.5, 4.0, 4.0, 4.0, 0.1, 90.0, 90.0, 90.0, 90.0, 90.0, 90.0):
        send(meter, 0.0, seconds)
        said.append(meter.becomes_slow(floor))
    assert said.count(True) == 2
    assert not said[0]


def test_latency_is_half_the_best_round_trip_and_forgets_slowly() -> None:
    meter = LinkMeter()
    for seconds in (0.4, 0.2, 0.2):
        meter.on_round_trip(seconds)
    assert meter.latency_s == pytest.approx(0.1)
    meter.on_round_trip(1.2)
    assert meter.latency_s == pytest.approx(0.15)


def test_traffic_adds_up() -> None:
    assert Traffic(1, 2, 3) + Traffic(10, 20, 30) == Traffic(11, 22, 33)
