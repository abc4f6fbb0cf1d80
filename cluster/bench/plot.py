"""A run as a picture: TTFT and ITL distributions, the load over time, and each request's TTFT when it was due."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbaton.cluster.bench.metrics import Summary
from kvbaton.cluster.bench.record import RequestRecord

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#3d8f5f", "#c23b3b", "#777777"
TIMELINE_BINS = 120


class PlotUnavailable(Exception):
    """matplotlib is not installed."""


def load_pyplot() -> Any:
    """matplotlib.pyplot on a back end without a display; raises `PlotUnavailable`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PlotUnavailable("--png needs matplotlib: pip install matplotlib") from error
    return pyplot


def draw(path: Path, title: str, records: Sequence[RequestRecord], summary: Summary) -> None:
    """Write a PNG of four panels; records of any outcome, even none."""
    pyplot = load_pyplot()
    done = [record for record in records if record.ok]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = pyplot.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
        figure.suptitle(title, fontsize=12)
        _ttft_cdf(panels[0][0], done, summary)
        _itl_cdf(panels[0][1], done, summary)
        _timeline(panels[1][0], records)
        _ttft_over_time(panels[1][1], records, summary)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _ttft_cdf(axes: Any, done: Sequence[RequestRecord], summary: Summary) -> None:
    axes.set_title("Time to first token")
    _cdf(axes, [record.ttft_s for record in done], BLUE, "from schedule")
    _cdf(axes, [record.ttft_sent_s for record in done], ORANGE, "from sending", dashed=True)
    limit = summary.goodput.slo.ttft if summary.goodput else None
    _finish_cdf(axes, limit, "share of requests")


def _itl_cdf(axes: Any, done: Sequence[RequestRecord], summary: Summary) -> None:
    unit = "tokens" if summary.latency.itl_per_token else "chunks"
    axes.set_title("Gaps between tokens (ITL), and their mean a request (TPOT)")
    _cdf(axes, [gap for record in done for gap in record.itl_s], BLUE, f"ITL, between {unit}")
    _cdf(axes, [tpot for record in done if (tpot := record.tpot_s) is not None], GREEN, "TPOT", dashed=True)
    limit = summary.goodput.slo.tpot if summary.goodput else None
    _finish_cdf(axes, limit, "share")


def _cdf(axes: Any, seconds: Sequence[float], colour: str, label: str, dashed: bool = False) -> None:
    if not seconds:
        return
    # Tokens of one chunk have a gap of zero, which a logarithmic axis cannot show: they sit at its left end.
    values = np.sort(np.maximum(1000 * np.asarray(seconds), 0.1))
    shares = np.arange(1, values.size + 1) / values.size
    axes.step(values, shares, where="post", color=colour, linestyle="--" if dashed else "-", label=label, linewidth=1.6)


def _finish_cdf(axes: Any, limit_s: float | None, what: str) -> None:
    for level in (0.5, 0.9, 0.99):
        axes.axhline(level, color=GREY, linewidth=0.5, alpha=0.5)
    if limit_s is not None:
        axes.axvline(1000 * limit_s, color=RED, linewidth=1.2, linestyle=":", label=f"SLO {1000 * limit_s:g} ms")
    _milliseconds_axis(axes)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99], ["0", "25 %", "50 %", "75 %", "90 %", ""])
    axes.set_xlabel("milliseconds")
    axes.set_ylabel(what)
    _legend(axes, "best")


def _milliseconds_axis(axes: Any) -> None:
    """Logarithmic with plain numbers where values spread widely; linear where one decade would show a single tick."""
    low, high = axes.dataLim.intervalx
    if not 0 < low < high / 4:
        return
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _legend(axes: Any, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=where, frameon=False)


def _timeline(axes: Any, records: Sequence[RequestRecord]) -> None:
    """Output tokens a second (left) and the mean number of requests under way (right) over the run."""
    axes.set_title("Load over time")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("output tokens per second", color=BLUE)
    if not records:
        return
    end_s = max(record.timeline.ended_s for record in records) or 1.0
    edges = np.linspace(0, end_s, min(TIMELINE_BINS, max(10, int(end_s * 4))) + 1)
    tokens, _ = np.histogram([moment for record in records for moment in record.timeline.token_times_s], edges)
    axes.stairs(tokens / np.diff(edges), edges, color=BLUE, fill=True, alpha=0.35)
    axes.set_xlim(0, end_s)
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.stairs(_mean_under_way(records, edges), edges, color=ORANGE, linewidth=1.4)
    right.set_ylabel("requests under way", color=ORANGE)
    right.set_ylim(bottom=0)


def _mean_under_way(records: Sequence[RequestRecord], edges: Any) -> Any:
    """Requests under way, averaged over each bin: [num_bins] from the bins' edges [num_bins + 1]."""
    sent = np.array([[record.timeline.sent_s] for record in records])
    ended = np.array([[record.timeline.ended_s] for record in records])
    overlap = np.minimum(ended, edges[1:]) - np.maximum(sent, edges[:-1])  # [num_records, num_bins]
    return np.maximum(overlap, 0).sum(axis=0) / np.diff(edges)


def _ttft_over_time(axes: Any, records: Sequence[RequestRecord], summary: Summary) -> None:
    axes.set_title("TTFT of each request, by its scheduled arrival")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("milliseconds")
    done = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok]
    axes.scatter(
        [record.timeline.scheduled_s for record in done], [1000 * record.ttft_s for record in done], s=10, color=BLUE
    )
    if failed:
        axes.scatter(
            [record.timeline.scheduled_s for record in failed], [0.0] * len(failed), s=26, marker="x", color=RED,
            clip_on=False, label=f"{len(failed)} without an answer",
        )  # fmt: skip
    limit = summary.goodput.slo.ttft if summary.goodput else None
    if limit is not None:
        axes.axhline(1000 * limit, color=RED, linewidth=1.2, linestyle=":", label=f"SLO {1000 * limit:g} ms")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend above the points
    _legend(axes, "upper right")
