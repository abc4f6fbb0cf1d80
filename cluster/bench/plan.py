"""From options to a plan: the requests of a run in order, their arrival times, and what had to be left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvbaton.cluster.bench.options import ArrivalOptions, BenchOptions, RandomOptions, TraceOptions, UsageError
from kvbaton.cluster.bench.traces import TraceEntry, read_trace
from kvbaton.cluster.bench.workload import (
    PlannedRequest,
    poisson_arrivals,
    random_requests,
    trace_arrivals,
    trace_requests,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """`arrivals` is None for a closed loop; `total` is None where only a duration ends the run.

    `too_long` counts the trace's requests that were left out because they do not fit the model's context.
    """

    requests: Iterator[PlannedRequest]
    arrivals: Iterator[float] | None
    total: int | None
    too_long: int = 0


def make_plan(options: BenchOptions, max_model_len: int) -> Plan:
    """The plan for a model of `max_model_len` tokens of context (0 = unknown). Reads the trace file if there is one."""
    if isinstance(options.requests, TraceOptions):
        return _trace_plan(options, options.requests, max_model_len)
    return _random_plan(options, options.requests)


def _random_plan(options: BenchOptions, wanted: RandomOptions) -> Plan:
    requests = random_requests(wanted.inputs, wanted.outputs, wanted.sharing, options.seed)
    return _limited(requests, _own_arrivals(options), options.arrivals, options.arrivals.num_requests)


def _trace_plan(options: BenchOptions, wanted: TraceOptions, max_model_len: int) -> Plan:
    entries = read_trace(wanted.path, wanted.limit)
    fitting = [entry for entry in entries if _fits(entry, wanted.length_scale, max_model_len)]
    if not fitting:
        raise UsageError(f"no request of {wanted.path} fits {max_model_len} tokens of context: use --length-scale")
    arrivals = _own_arrivals(options)
    if arrivals is None and options.arrivals.concurrency is None:
        arrivals = iter(trace_arrivals(fitting, wanted.speed, wanted.jitter_s, options.seed))
    total = min(len(fitting), options.arrivals.num_requests or len(fitting))
    plan = _limited(trace_requests(fitting, wanted.length_scale), arrivals, options.arrivals, total)
    return Plan(plan.requests, plan.arrivals, plan.total, len(entries) - len(fitting))


def _fits(entry: TraceEntry, length_scale: float, max_model_len: int) -> bool:
    # One token of slack each: the scaled lengths are rounded separately.
    tokens = (entry.input_tokens + entry.output_tokens) * length_scale + 2
    return not max_model_len or tokens <= max_model_len


def _own_arrivals(options: BenchOptions) -> Iterator[float] | None:
    """The arrivals that the options ask for by rate; None for a closed loop or the trace's times."""
    wanted = options.arrivals
    if wanted.rate is None:
        return None
    return poisson_arrivals(wanted.rate, options.seed, wanted.burstiness)


def _limited(
    requests: Iterator[PlannedRequest], arrivals: Iterator[float] | None, wanted: ArrivalOptions, total: int | None
) -> Plan:
    """Cut both streams to `total` requests, and the arrivals to the duration (a closed loop's runner watches that)."""
    limit_s = wanted.duration_s
    if arrivals is not None and limit_s is not None:
        arrivals = itertools.takewhile(lambda moment_s: moment_s < limit_s, arrivals)
    return Plan(itertools.islice(requests, total), arrivals, total if limit_s is None else None)


def until(requests: Iterator[PlannedRequest], clock: Callable[[], float], end_s: float) -> Iterator[PlannedRequest]:
    """The requests that a closed loop asks for before `end_s`."""
    for request in requests:
        if clock() >= end_s:
            return
        yield request
