"""A run as people and programs see it: a progress bar, then the result as a table and as JSON.

Seconds in JSON, milliseconds on screen.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvbaton import __version__
from kvbaton.cluster.bench.metrics import Spread, Summary
from kvbaton.cluster.bench.record import RequestRecord

SCHEMA = "kvbaton.bench.serve/1"
REFRESH_PER_S = 2.0


class ProgressBar:
    """A context manager and run observer: requests done of total, under way, failed, output tokens.

    Drawn only twice a second: drawing holds the interpreter while tokens wait.
    """

    def __init__(self, console: Console, total: int | None, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[running]} under way · {task.fields[failed]} failed · {task.fields[tokens]} tokens"
            ),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=REFRESH_PER_S,
            disable=not enabled,
        )
        self._task = self._bar.add_task("requests", total=total, running=0, failed=0, tokens=0)
        self._running = 0
        self._failed = 0
        self._tokens = 0

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def started(self) -> None:
        self._running += 1
        self._bar.update(self._task, running=self._running)

    def finished(self, record: RequestRecord) -> None:
        self._running -= 1
        self._failed += not record.ok
        self._tokens += record.output_tokens
        self._bar.update(self._task, advance=1, running=self._running, failed=self._failed, tokens=self._tokens)


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the client ran."""

    kvbaton: str
    python: str
    machine: str
    cpus: int


@dataclass(frozen=True, slots=True)
class ClientCost:
    """What the load generator itself used while it measured, so that a reader can see that it was not the limit."""

    cpu_s: float
    cpu_us_per_token: float
    cpu_share: float  # of one core, over the run


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is kept of a run. `command` reproduces it; no key or token is in it."""

    started_at: str
    command: str
    url: str
    model: str
    interrupted: bool
    too_long: int
    client: ClientCost
    summary: Summary


def this_environment() -> Environment:
    return Environment(__version__, platform.python_version(), platform.machine(), os.cpu_count() or 1)


def client_cost(cpu_s: float, summary: Summary) -> ClientCost:
    tokens = max(1, summary.tokens.output)
    return ClientCost(cpu_s, 1e6 * cpu_s / tokens, cpu_s / summary.duration_s if summary.duration_s else 0.0)


def write_json(path: Path, report: Report, records: Sequence[RequestRecord], token_times: bool) -> None:
    """One JSON object: schema, environment, the report's fields and one entry a request."""
    document = {
        "schema": SCHEMA,
        "environment": this_environment(),
        "report": report,
        "requests": [_request_row(record, token_times) for record in records],
    }
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


def _request_row(record: RequestRecord, token_times: bool) -> dict[str, Any]:
    times = record.timeline
    row: dict[str, Any] = {
        "index": record.index,
        "scheduled_s": times.scheduled_s,
        "sent_s": times.sent_s,
        "ended_s": times.ended_s,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "asked_tokens": record.asked_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
        "failure": record.failure,
        "ttft_s": record.ttft_s if times.token_times_s else None,
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
    }
    if token_times:
        row["token_times_s"] = [round(moment, 6) for moment in times.token_times_s]
    return row


def print_report(console: Console, report: Report) -> None:
    """The table and the lines round it."""
    summary = report.summary
    if report.interrupted:
        console.print("[yellow]stopped early: partial results[/yellow]")
    console.print(f"model {report.model} at {report.url}", highlight=False, soft_wrap=True)
    console.print(_latency_table(summary))
    for line in _lines(report):
        console.print(line, highlight=False, soft_wrap=True)


def _latency_table(summary: Summary) -> Table:
    table = Table(title=f"{summary.completed} completed, {summary.failed} failed in {summary.duration_s:.1f} s")
    table.add_column("milliseconds", no_wrap=True)
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    latency = summary.latency
    gap = "ITL" if latency.itl_per_token else "ITL (between chunks)"
    rows = (
        ("TTFT (from schedule)", latency.ttft),
        ("TTFT (from sending)", latency.ttft_sent),
        ("TPOT", latency.tpot),
        (gap, latency.itl),
        ("E2E (from schedule)", latency.e2e),
    )
    for name, spread in rows:
        table.add_row(name, *_cells(spread))
    return table


def _cells(spread: Spread) -> list[str]:
    if not spread.count:
        return ["-"] * 5
    return [f"{1000 * value:.2f}" for value in (spread.mean, spread.p50, spread.p90, spread.p99, spread.high)]


def _lines(report: Report) -> list[str]:
    summary = report.summary
    tokens, rates = summary.tokens, summary.throughput
    client = report.client
    lines = [
        f"throughput  {rates.requests_per_s:.2f} requests/s, {rates.output_tokens_per_s:.1f} output tokens/s, "
        f"{rates.input_tokens_per_s:.1f} input tokens/s",
        f"tokens      {tokens.input} in, {tokens.output} out{_cached(summary)}",
        f"client      {client.cpu_us_per_token:.0f} µs CPU a token, {100 * client.cpu_share:.0f} % of a core; "
        f"sent {1000 * summary.send_lag.p99:.1f} ms late at p99, at most {summary.peak_in_flight} under way",
    ]
    if tokens.short_answers:
        lines.append(f"short       {tokens.short_answers} answers have fewer tokens than asked for")
    if report.too_long:
        lines.append(f"left out    {report.too_long} requests of the trace are longer than the model's context")
    return [*lines, *_goodput_lines(summary), *_error_lines(summary)]


def _cached(summary: Summary) -> str:
    tokens = summary.tokens
    if tokens.cached is None:
        return ""
    return f"; {tokens.cached} cached ({100 * tokens.cached / max(1, tokens.input):.1f} % of input)"


def _goodput_lines(summary: Summary) -> list[str]:
    goodput = summary.goodput
    if goodput is None:
        return []
    limits = [(name, getattr(goodput.slo, name)) for name in ("ttft", "tpot", "e2e")]
    text = ", ".join(f"{name} ≤ {1000 * limit:g} ms" for name, limit in limits if limit is not None)
    share = f"{goodput.requests_per_s:.2f} requests/s, {100 * goodput.share:.1f} % of requests"
    return [f"goodput     {share} with {text}"]


def _error_lines(summary: Summary) -> list[str]:
    lines = [f"[red]error[/red]       {error.count} × {error.kind}: {error.example}" for error in summary.errors]
    if summary.interrupted:
        lines.append(f"stopped     {summary.interrupted} requests were given up half way")
    return lines
