"""How long prefill chunks are, from rates that the engine measures on itself when it starts.

A longer chunk uses the device better, up to a point. Past that point it only delays: the streams that decode beside it
(Sarathi-Serve, arXiv 2403.02310), and the blocks that travel behind it. So the engine takes the shortest chunk whose
rate is at least SHARE of the best.

Sizes double from LEAST_CHUNK on. All are timed in the middle of the same context, so that a token attends to as much
in a chunk of any size. What is timed is a step of the engine's own runner, on blocks of its own pool, which are given
back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.runner import Runner
from kvbaton.engine.sequence import Sequence as Tokens

log = logging.getLogger(__name__)

SHARE = 0.95
LEAST_CHUNK = 128
BUDGET_S = 10.0  # no run starts that would end later, except one of the least size
RUNS = 3  # per size; the fastest counts, since noise only slows things down


@dataclass(frozen=True, slots=True)
class ChunkRate:
    """How many tokens a second (`tokens_s`) chunks of `tokens` tokens give."""

    tokens: int
    tokens_s: float


def chunk_sizes(most: int) -> tuple[int, ...]:
    """Ascending, none above `most`; `most` alone where it is less than LEAST_CHUNK."""
    sizes = []
    size = LEAST_CHUNK
    while size <= most:
        sizes.append(size)
        size *= 2
    return tuple(sizes) or (most,)


def measure(
    run_s: Callable[[int], float], sizes: Sequence[int], clock: Callable[[], float] = time.monotonic
) -> list[ChunkRate]:
    """The rate of each size, the smallest first, as far as BUDGET_S allows; `run_s` runs a chunk and gives its seconds.

    One extra run of the first size comes before the budget starts: it compiles kernels and fills caches.
    """
    run_s(sizes[0])
    deadline = clock() + BUDGET_S
    rates: list[ChunkRate] = []
    expected_s = 0.0
    for size in sizes:
        seconds: list[float] = []
        while len(seconds) < RUNS and (not (rates or seconds) or clock() + expected_s <= deadline):
            seconds.append(run_s(size))
            expected_s = min(seconds)
        if not seconds:
            break
        rates.append(ChunkRate(size, size / expected_s))
        expected_s *= 2
    return rates


def choose(rates: Sequence[ChunkRate], share: float = SHARE) -> int:
    """Tokens of the shortest chunk whose rate is at least `share` of the best. Raises ValueError for no rates."""
    if not rates:
        raise ValueError("no chunk was measured")
    enough = share * max(rate.tokens_s for rate in rates)
    return min(rate.tokens for rate in rates if rate.tokens_s >= enough)


def measured_chunk(runner: Runner, kv: KVManager, most: int, vocab_size: int) -> int:
    """Time chunks of at most `most` tokens, the longest that a step and a sequence may have, and choose. The pool's
    books are unchanged afterwards; the contents of blocks that nobody holds are not."""
    blocks = kv.allocate(-(-most // kv.block_size))
    prompt = tuple(i * 31 % vocab_size for i in range(most))
    try:
        rates = measure(lambda size: _chunk_s(runner, blocks, prompt, size), chunk_sizes(most))
    finally:
        kv.release(blocks)
    chosen = choose(rates)
    shown = ", ".join(f"{rate.tokens}: {rate.tokens_s:.0f}/s" for rate in rates)
    log.info("prefill chunks of %d tokens; measured: %s", chosen, shown)
    return chosen


def _chunk_s(runner: Runner, blocks: list[int], prompt: tuple[int, ...], size: int) -> float:
    """Seconds of one chunk of `size` tokens in the middle of `prompt`."""
    seq = Tokens(Request("chunk size", prompt, SamplingParams(max_tokens=1, temperature=0.0)), 0.0)
    seq.block_table = blocks
    seq.num_computed = (len(prompt) - size) // 2
    began = time.perf_counter()
    runner.run([ScheduledRow(seq, size, ())])
    return time.perf_counter() - began
