"""How long a stream stands still while its sequence moves to another engine, over real UCX between two processes.

    PYTHONPATH=tests python benchmarks/migration.py            [--size small] [--context 2000] [--moves 10] [--tls all]

One stream at a time decodes; it is moved to and fro. The pause of a move is a gap between two tokens minus the mean
step of the same stream unmoved: the one at the handover, and the longest round the whole move, which shares the
machine's cores with the copy. Beside them stands what a pause may be: two steps and one round trip of the transfer
plane. The tokens are compared with those of the unmoved stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import TinySpec, make_tiny
from kvbaton.router.engine_info import Role
from support.local_cluster import LocalCluster

ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
DECODERS = ("decode-1", "decode-2")
SIZES = {
    "tiny": TinySpec(),
    "small": TinySpec(layers=12, hidden=384, heads=12, kv_heads=6, head_dim=32, check=False),
}
WARM_TOKENS = 20
TOKENS_BETWEEN = 40


@dataclass(frozen=True, slots=True)
class MigrationFigures:
    """Milliseconds. `whole_ms`: from the order to its end. `handover_ms`: between the source's last token and the
    target's first; `longest_ms`: the longest gap from 1 token before the order to 5 after the end, the copy included.
    Either minus the mean step is a pause."""

    context_tokens: int
    whole_ms: float
    handover_ms: float
    longest_ms: float


class TimedStream:
    """Reads a stream and notes when each token came."""

    def __init__(self, cluster: LocalCluster, request: Request) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.engines: list[str] = []  # which one the sample was at when the token came
        self._cluster = cluster
        self._request = request
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def has(self, count: int) -> None:
        while len(self.tokens) < count and not self.task.done():
            self._changed.clear()
            await self._changed.wait()

    def engine(self) -> str:
        attempt = self._cluster.client.attempts.working_on(self._request.request_id, 0)
        assert attempt is not None
        return attempt.second.info.engine_id

    def gaps(self, first: int, last: int) -> list[float]:
        """Between token i and i + 1, for i in [first, last)."""
        return [self.times[i + 1] - self.times[i] for i in range(first, last)]

    def handover_s(self, first: int, last: int) -> float:
        """The gap before the first token of another engine, in the tokens [first, last)."""
        start = self.engines[first - 1]
        at = next(i for i in range(first, last) if self.engines[i] != start)
        return self.times[at] - self.times[at - 1]

    async def _read(self) -> None:
        async for outputs in self._cluster.client.generate(self._request):
            now = time.perf_counter()
            for output in outputs:
                assert output.token_id is not None
                self.tokens.append(output.token_id)
                self.times.append(now)
                self.engines.append(self.engines[-1] if output.finish else self.engine())
            self._changed.set()
        self._changed.set()


def make_request(name: str, context: int, max_tokens: int) -> Request:
    prompt = tuple((i * 37 + i // 11 * 5) % 200 + 20 for i in range(context))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=3, temperature=0.8, ignore_eos=True))


async def moved_stream(
    cluster: LocalCluster, request: Request, moves: int
) -> tuple[TimedStream, list[MigrationFigures]]:
    stream = TimedStream(cluster, request)
    await stream.has(WARM_TOKENS)
    spans: list[tuple[int, int, float]] = []
    for _ in range(moves):
        source = stream.engine()
        (target,) = set(DECODERS) - {source}
        before, started = len(stream.tokens), time.perf_counter()
        refusal = await cluster.client.migrate(request.request_id, 0, target)
        if refusal is not None:
            raise RuntimeError(f"not migrated: {refusal}")
        spans.append((before, len(stream.tokens), time.perf_counter() - started))
        await stream.has(len(stream.tokens) + TOKENS_BETWEEN)
    await stream.task
    figures = []
    for before, after, whole_s in spans:
        gap_s = max(stream.gaps(max(0, before - 1), min(after + 5, len(stream.tokens) - 1)))
        context = len(request.prompt) + after
        figures.append(
            MigrationFigures(context, whole_s * 1e3, stream.handover_s(before, after + 5) * 1e3, gap_s * 1e3)
        )
    return stream, figures


async def round_trip_s(cluster: LocalCluster) -> float:
    """The transfer plane's, as the engines have measured it."""
    stats = [await asyncio.to_thread(cluster.engines[name].stats) for name in DECODERS]
    measured = [peer.latency_s for s in stats for peer in s.transfer.peers if peer.latency_s is not None]
    return min(measured, default=0.0)


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    max_tokens = WARM_TOKENS + args.migrations * (TOKENS_BETWEEN + 30) + 20
    async with LocalCluster(folder, ROLES) as cluster:
        still = TimedStream(cluster, make_request("still", args.context, max_tokens))
        await still.task
        stream, figures = await moved_stream(cluster, make_request("moved", args.context, max_tokens), args.migrations)
        round_trip = await round_trip_s(cluster)
        await cluster.assert_clean()
    step_s = statistics.fmean(still.gaps(5, len(still.tokens) - 1))
    handovers = [figure.handover_ms - step_s * 1e3 for figure in figures]
    longest = [figure.longest_ms - step_s * 1e3 for figure in figures]
    return {
        "command": " ".join(["PYTHONPATH=tests python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "size": args.size,
        "load_average": os.getloadavg()[0],
        "tokens_equal": stream.tokens == still.tokens,
        "tokens": len(still.tokens),
        "step_ms": step_s * 1e3,
        "worst_gap_unmoved_ms": max(still.gaps(5, len(still.tokens) - 1)) * 1e3,
        "round_trip_ms": round_trip * 1e3,
        "allowed_pause_ms": (2 * step_s + round_trip) * 1e3,
        "median_handover_pause_ms": statistics.median(handovers),
        "worst_handover_pause_ms": max(handovers),
        "median_longest_pause_ms": statistics.median(longest),
        "worst_longest_pause_ms": max(longest),
        "moves": [asdict(figure) for figure in figures],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2000, help="prompt tokens")
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="of the model")
    parser.add_argument("--tls", default="all", help="UCX_TLS, e.g. tcp")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    os.environ["UCX_TLS"] = args.tls
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder), SIZES[args.size])
        result = asyncio.run(measure(args, Path(folder)))
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if result["tokens_equal"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
