"""`kvbaton bench serve`: measures an OpenAI-compatible endpoint under load.

    options -> model, vocabulary -> workload -> warm-up -> run -> summary -> table, JSON, PNG

Exit status: 0 when at least one request completed, 1 when none did, 2 for wrong options or an endpoint that cannot be
measured, 130 after Ctrl-C (the partial results are printed and written all the same).
"""

from __future__ import annotations

import asyncio
import gc
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import uvloop
from rich.console import Console

from kvbaton.cluster.bench.client import CompletionClient, Job
from kvbaton.cluster.bench.connection import ConnectionFailed, HttpClient
from kvbaton.cluster.bench.metrics import Summary, summarize
from kvbaton.cluster.bench.options import BenchOptions, UsageError, parse_options
from kvbaton.cluster.bench.plot import PlotUnavailable, draw, load_pyplot
from kvbaton.cluster.bench.record import RequestRecord
from kvbaton.cluster.bench.report import ProgressBar, Report, client_cost, print_report, write_json
from kvbaton.cluster.bench.runner import LoadRun, WallPacer
from kvbaton.cluster.bench.target import BodyTemplate, Model, TargetError, find_model, find_vocabulary
from kvbaton.cluster.bench.traces import TraceError
from kvbaton.cluster.bench.workload import PlannedRequest, PromptTokens, Workload, make_workload, until, warmup_request

EXIT_OK, EXIT_ALL_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
WARMUP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left: its records and what the client itself spent."""

    records: list[RequestRecord]
    cpu_s: float
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything known before the clock starts."""

    model: Model
    encode: Callable[[PlannedRequest], bytes]
    workload: Workload


def main(argv: list[str]) -> int:
    """Run the benchmark that `argv` (without the program's name) describes; returns the exit status."""
    console = Console()
    try:
        options = parse_options(argv)
        if options.output.png:
            load_pyplot()  # a missing matplotlib must not cost a finished run
        return uvloop.run(_bench(console, options, shlex.join(argv)))
    except (UsageError, TargetError, TraceError, PlotUnavailable, ConnectionFailed) as error:
        console.print(f"[red]kvbaton bench serve:[/red] {error}", highlight=False, soft_wrap=True)
        return EXIT_USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped before anything was measured")
        return EXIT_INTERRUPTED


class _Interrupt:
    """What Ctrl-C ends: the run once there is one, before that the whole program. Once stopped, a run's results are
    printed and written however often Ctrl-C is pressed."""

    def __init__(self, program: asyncio.Task[Any] | None) -> None:
        self._program = program
        self.run: LoadRun | None = None

    def __call__(self) -> None:
        if self.run is not None:
            self.run.stop()
        elif self._program is not None:
            self._program.cancel()


async def _bench(console: Console, options: BenchOptions, command: str) -> int:
    loop = asyncio.get_running_loop()
    interrupt = _Interrupt(asyncio.current_task())
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await _bench_until(interrupt, console, options, command)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _bench_until(interrupt: _Interrupt, console: Console, options: BenchOptions, command: str) -> int:
    http = HttpClient(options.target.address, options.target.api_key)
    try:
        prepared = await _prepare(http, options)
        await _warm_up(http, options, prepared)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        outcome = await _measure(interrupt, console, http, options, prepared)
    finally:
        http.close()
    summary = summarize(outcome.records, options.slo)
    report = Report(
        started_at=started_at,
        command=f"kvbaton bench serve {_without_key(command, options)}",
        url=f"{options.target.address.host_header}{options.target.address.path}",
        model=prepared.model.name,
        interrupted=outcome.interrupted,
        too_long=prepared.workload.too_long,
        client=client_cost(outcome.cpu_s, summary),
        summary=summary,
    )
    _publish(console, options, report, outcome.records)
    return _exit_status(outcome, summary)


def _without_key(command: str, options: BenchOptions) -> str:
    key = options.target.api_key
    return command.replace(key, "***") if key else command


async def _prepare(http: HttpClient, options: BenchOptions) -> Prepared:
    target = options.target
    model = await find_model(http, target.model)
    vocabulary: Sequence[int]
    if target.vocab_size is not None:
        vocabulary = range(target.vocab_size)
    else:
        vocabulary = await find_vocabulary(http, model.name)
    tokens = PromptTokens(vocabulary, options.seed)
    template = BodyTemplate(model.name, target.ignore_eos, target.temperature, target.extra_body)

    def encode(request: PlannedRequest) -> bytes:
        return template.encode(tokens.tokens(request.segments), request.output_tokens)

    return Prepared(model, encode, make_workload(options, model.max_model_len))


async def _warm_up(http: HttpClient, options: BenchOptions, prepared: Prepared) -> None:
    """Requests whose prompts share nothing with the measured ones; a failure here ends the run before it starts."""
    client = CompletionClient(http, time.perf_counter, options.target.timeout_s)
    for index in range(options.warmup):
        request = warmup_request(index, 8, WARMUP_TOKENS)
        job = Job(index, prepared.encode(request), time.perf_counter(), WARMUP_TOKENS, 8)
        record = await client.run(job)
        if record.interrupted:
            raise asyncio.CancelledError
        if record.failure is not None:
            raise TargetError(f"the warm-up request failed ({record.failure.kind}): {record.failure.message}")


async def _measure(
    interrupt: _Interrupt, console: Console, http: HttpClient, options: BenchOptions, prepared: Prepared
) -> Outcome:
    """Run the workload under the progress bar; Ctrl-C stops it and keeps what was measured."""
    workload = prepared.workload
    show = options.output.progress and console.is_terminal
    gc.collect()
    gc.freeze()  # what lives now lives through the run: the collector need not walk it between tokens
    with ProgressBar(console, workload.total, show) as bar:
        pacer = WallPacer()
        client = CompletionClient(http, pacer.now, options.target.timeout_s)
        run = LoadRun(client, prepared.encode, pacer, bar)
        interrupt.run = run
        cpu_before_s = time.process_time()
        records = await _drive(run, workload, options, pacer)
        return Outcome(records, time.process_time() - cpu_before_s, run.stopped)


async def _drive(run: LoadRun, workload: Workload, options: BenchOptions, pacer: WallPacer) -> list[RequestRecord]:
    wanted = options.arrivals
    if workload.arrivals is not None:
        return await run.open_loop(zip(workload.arrivals, workload.requests, strict=False), wanted.max_in_flight)
    requests = workload.requests
    if wanted.duration_s is not None:
        requests = until(requests, pacer.now, wanted.duration_s)
    return await run.closed_loop(requests, wanted.concurrency or 1)


def _publish(console: Console, options: BenchOptions, report: Report, records: Sequence[RequestRecord]) -> None:
    print_report(console, report)
    output = options.output
    if output.json:
        write_json(output.json, report, records, output.token_times)
        console.print(f"wrote {output.json}", highlight=False, soft_wrap=True)
    if output.png:
        draw(output.png, f"{report.model}, {_title(report.summary)}", records, report.summary)
        console.print(f"wrote {output.png}", highlight=False, soft_wrap=True)


def _title(summary: Summary) -> str:
    rates = summary.throughput
    return (
        f"{summary.completed} requests in {summary.duration_s:.1f} s: "
        f"{rates.requests_per_s:.2f} requests/s, {rates.output_tokens_per_s:.0f} output tokens/s"
    )


def _exit_status(outcome: Outcome, summary: Summary) -> int:
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if summary.completed else EXIT_ALL_FAILED
