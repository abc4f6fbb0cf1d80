"""The workload of a run: which requests are sent, of which tokens, and when. All of it follows from options and seed.

Arrivals and requests are separate streams: an open loop zips them; a closed loop has no arrivals and sends a request
when an earlier one ends.

A prompt is a row of segments. Each segment names an endless stream of tokens by (kind, key) and takes the first
`num_tokens` of it, so equal segments are equal tokens in every request and in every run with the same seed:

    own prompt of request 7            [ own 7: 128 ]
    group 3 with a shared prefix       [ group 3: 512 | own 7: 128 ]
    Mooncake hash_ids [0, 42, 43]      [ block 0: 512 | block 42: 512 | block 43: 266 ]
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvbaton.cluster.bench.lengths import Lengths
from kvbaton.cluster.bench.options import (
    ArrivalOptions,
    BenchOptions,
    PrefixSharing,
    RandomOptions,
    TraceOptions,
    UsageError,
)
from kvbaton.cluster.bench.traces import MOONCAKE_BLOCK_TOKENS, TraceEntry, read_trace

TokenIds = np.ndarray[tuple[int], np.dtype[np.int64]]  # [num_tokens]
ARRIVAL_STREAM = 101
LENGTH_STREAM = 102
GROUP_STREAM = 103
JITTER_STREAM = 104


class Kind(enum.IntEnum):
    """What names a token stream. The numbers seed the generator: do not renumber."""

    OWN = 0
    GROUP = 1
    BLOCK = 2
    WARMUP = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """The first `num_tokens` tokens of one stream."""

    kind: Kind
    key: int
    num_tokens: int


class PromptTokens:
    """Turns segments into token ids of a vocabulary. Pure: the same seed and segments give the same ids."""

    def __init__(self, vocabulary: Sequence[int], seed: int) -> None:
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self._vocabulary = np.asarray(vocabulary, dtype=np.int64)  # [num_ids]
        self._seed = seed

    def tokens(self, segments: Sequence[Segment]) -> TokenIds:
        """The ids of all segments in a row: [sum of num_tokens]."""
        return np.concatenate([self._segment(segment) for segment in segments])

    def _segment(self, segment: Segment) -> TokenIds:
        rng = np.random.default_rng((self._seed, segment.kind, segment.key))
        picks = rng.integers(len(self._vocabulary), size=segment.num_tokens)
        return self._vocabulary[picks]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it is sent: the recipe of its prompt and the number of tokens to ask for."""

    index: int
    segments: tuple[Segment, ...]
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


def poisson_arrivals(rate: float, seed: int, burstiness: float = 1.0) -> Iterator[float]:
    """Endless arrival times in seconds, `rate` a second on average.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, below 1 comes in bursts (the gaps'
    coefficient of variation is burstiness ** -0.5), above 1 is more even.
    """
    rng = np.random.default_rng((seed, ARRIVAL_STREAM))
    now_s = 0.0
    while True:
        now_s += float(rng.gamma(burstiness, 1.0 / (rate * burstiness)))
        yield now_s


def trace_arrivals(entries: Sequence[TraceEntry], speed: float, jitter_s: float, seed: int) -> list[float]:
    """A trace's arrival times played `speed` times as fast, each moved later by up to `jitter_s` (of trace time).

    Jitter undoes a coarse clock in the trace: Mooncake's conversation trace stamps whole three-second steps.
    """
    rng = np.random.default_rng((seed, JITTER_STREAM))
    moved = [entry.arrival_s + jitter_s * float(rng.random()) for entry in entries]
    return sorted(arrival / speed for arrival in moved)


def random_requests(inputs: Lengths, outputs: Lengths, sharing: PrefixSharing, seed: int) -> Iterator[PlannedRequest]:
    """Endless requests with drawn lengths. A shared prefix comes on top of the drawn input length."""
    lengths = np.random.default_rng((seed, LENGTH_STREAM))
    groups = np.random.default_rng((seed, GROUP_STREAM))
    for index in itertools.count():
        own = Segment(Kind.OWN, index, inputs.draw(lengths))
        shared = Segment(Kind.GROUP, int(groups.integers(sharing.groups)), sharing.tokens)
        yield PlannedRequest(index, (shared, own) if sharing.tokens else (own,), outputs.draw(lengths))


def trace_requests(entries: Sequence[TraceEntry], length_scale: float) -> Iterator[PlannedRequest]:
    """The requests of a trace with every length multiplied by `length_scale` (blocks too, so sharing is kept)."""
    block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale))
    for index, entry in enumerate(entries):
        input_tokens = max(1, round(entry.input_tokens * length_scale))
        segments = _trace_segments(index, input_tokens, entry.hash_ids, block_tokens)
        yield PlannedRequest(index, segments, max(1, round(entry.output_tokens * length_scale)))


def _trace_segments(index: int, num_tokens: int, hash_ids: Sequence[int], block_tokens: int) -> tuple[Segment, ...]:
    """Blocks by hash id as far as they reach; what is left (rounding, or no ids at all) is the request's own."""
    segments = []
    left = num_tokens
    for hash_id in hash_ids:
        if not left:
            break
        segments.append(Segment(Kind.BLOCK, hash_id, min(block_tokens, left)))
        left -= segments[-1].num_tokens
    if left:
        segments.append(Segment(Kind.OWN, index, left))
    return tuple(segments)


def warmup_request(index: int, output_tokens: int, input_tokens: int) -> PlannedRequest:
    """A request that shares no token stream with any measured one."""
    return PlannedRequest(index, (Segment(Kind.WARMUP, index, input_tokens),), output_tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """`arrivals` is None for a closed loop; `total` is None where only a duration ends the run.

    `too_long` counts the trace's requests that were left out because they do not fit the model's context.
    """

    requests: Iterator[PlannedRequest]
    arrivals: Iterator[float] | None
    total: int | None
    too_long: int = 0


def make_workload(options: BenchOptions, max_model_len: int) -> Workload:
    """The workload for a model of `max_model_len` tokens of context (0 = unknown). Reads the trace file, if any."""
    if isinstance(options.requests, TraceOptions):
        return _of_trace(options, options.requests, max_model_len)
    return _of_lengths(options, options.requests)


def _of_lengths(options: BenchOptions, wanted: RandomOptions) -> Workload:
    requests = random_requests(wanted.inputs, wanted.outputs, wanted.sharing, options.seed)
    return _limited(requests, _own_arrivals(options), options.arrivals, options.arrivals.num_requests)


def _of_trace(options: BenchOptions, wanted: TraceOptions, max_model_len: int) -> Workload:
    entries = read_trace(wanted.path, wanted.limit)
    fitting = [entry for entry in entries if _fits(entry, wanted.length_scale, max_model_len)]
    if not fitting:
        raise UsageError(f"no request of {wanted.path} fits {max_model_len} tokens of context: use --length-scale")
    arrivals = _own_arrivals(options)
    if arrivals is None and options.arrivals.concurrency is None:
        arrivals = iter(trace_arrivals(fitting, wanted.speed, wanted.jitter_s, options.seed))
    total = min(len(fitting), options.arrivals.num_requests or len(fitting))
    cut = _limited(trace_requests(fitting, wanted.length_scale), arrivals, options.arrivals, total)
    return Workload(cut.requests, cut.arrivals, cut.total, len(entries) - len(fitting))


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
) -> Workload:
    """Cut both streams to `total` requests, and the arrivals to the duration (a closed loop's runner watches that)."""
    limit_s = wanted.duration_s
    if arrivals is not None and limit_s is not None:
        arrivals = itertools.takewhile(lambda moment_s: moment_s < limit_s, arrivals)
    return Workload(itertools.islice(requests, total), arrivals, total if limit_s is None else None)


def until(requests: Iterator[PlannedRequest], clock: Callable[[], float], end_s: float) -> Iterator[PlannedRequest]:
    """The requests that a closed loop asks for before `end_s`."""
    for request in requests:
        if clock() >= end_s:
            return
        yield request
