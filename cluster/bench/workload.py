"""The load: which requests are sent, and when. Everything here follows from the seed; nothing here does I/O.

Arrivals and requests are separate streams: an open loop zips them; a closed loop has no arrivals and sends a request
when an earlier one ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvbaton.cluster.bench.lengths import Lengths
from kvbaton.cluster.bench.prompts import Kind, Segment
from kvbaton.cluster.bench.traces import MOONCAKE_BLOCK_TOKENS, TraceEntry

ARRIVAL_STREAM = 101
LENGTH_STREAM = 102
GROUP_STREAM = 103
JITTER_STREAM = 104


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it is sent: the recipe of its prompt and the number of tokens to ask for."""

    index: int
    segments: tuple[Segment, ...]
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """Each request starts with the prefix of one of `groups` groups, `tokens` long; 0 tokens = nothing shared."""

    tokens: int = 0
    groups: int = 1


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
