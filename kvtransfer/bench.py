"""`kvbaton bench transfer`: block transfer through the real hand-off path beside `ucx_perftest tag_bw`.

Two processes with an agent each move hand-offs over UCX (offer, grant, blocks, done, ack); each round runs perftest
and then ours at the same message size and UCX_TLS, so the ratio is of figures taken seconds apart. Both clocks start
after a warm-up. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from kvbaton.kvtransfer.config import CHECKSUM_OFF, CHECKSUMS, Checksum
from kvbaton.kvtransfer.perftest import tag_bandwidth

_KIB = 1024
_SINGLES = 20
DEFAULT_SIZES = (64 * _KIB, 256 * _KIB, 1024 * _KIB, 2048 * _KIB, 8192 * _KIB)


@dataclass(frozen=True, slots=True)
class TransferBenchOptions:
    """`megabytes` is moved per round and size, but no more than `max_blocks` and no fewer than 32 blocks."""

    sizes: tuple[int, ...] = DEFAULT_SIZES
    tls: tuple[str, ...] = ("all", "tcp")
    rounds: int = 5
    megabytes: int = 512
    max_blocks: int = 2048
    blocks_each: int = 32
    concurrent: int = 2
    pool_megabytes: int = 256
    checksum: Checksum = CHECKSUM_OFF


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Medians of one size and UCX_TLS; GB is 1e9 bytes; `ratio` is the median of the rounds' ratios.

    `one_block_us` is the time of a whole hand-off of one block, offer to release, one after another.
    """

    tls: str
    block_bytes: int
    perftest_gb_s: float
    handoff_gb_s: float
    ratio: float
    one_block_us: float
    checksum: str
    transports: str


class BenchProcess:
    """One peer process; `ask` sends a command and waits for its answer."""

    def __init__(self, tls: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvbaton.kvtransfer.bench_peer"],
            env={**os.environ, "UCX_TLS": tls},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the benchmark's process has no pipes")
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the benchmark's process ended with {self._process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def measure(options: TransferBenchOptions, progress: TextIO) -> list[BenchRow]:
    """All sizes under all UCX_TLS settings."""
    rows = []
    for tls in options.tls:
        prefill, decode = BenchProcess(tls), BenchProcess(tls)
        try:
            for size in options.sizes:
                row = _measure_size(options, tls, size, prefill, decode)
                rows.append(row)
                progress.write(_format(row) + "\n")
                progress.flush()
        finally:
            prefill.stop()
            decode.stop()
    return rows


def _measure_size(
    options: TransferBenchOptions, tls: str, size: int, prefill: BenchProcess, decode: BenchProcess
) -> BenchRow:
    blocks = max(32, min(options.max_blocks, (options.megabytes << 20) // size))
    each = min(options.blocks_each, blocks)
    pool = max(each * options.concurrent, min(blocks, (options.pool_megabytes << 20) // size))
    pool -= pool % each
    memory = {"do": "open", "num_blocks": pool, "block_bytes": size, "checksum": options.checksum}
    port = decode.ask(**memory, side="decode")["port"]
    prefill.ask(**memory, side="prefill")
    run = {"do": "run", "port": port, "blocks_each": each, "concurrent": options.concurrent}
    prefill.ask(**run, handoffs=max(2, pool // each))
    pairs, singles = [], []
    transports = ""
    for _ in range(options.rounds):
        yardstick = tag_bandwidth(size, blocks, {"UCX_TLS": tls})
        answer = prefill.ask(**run, handoffs=blocks // each)
        transports = answer["transports"]
        pairs.append((yardstick, blocks // each * each * size / answer["seconds"]))
        alone = prefill.ask(do="run", port=port, blocks_each=1, concurrent=1, handoffs=_SINGLES)
        singles.append(alone["seconds"] / _SINGLES * 1e6)
    prefill.ask(do="close")
    decode.ask(do="close")
    return BenchRow(
        tls=tls,
        block_bytes=size,
        perftest_gb_s=statistics.median(p for p, _ in pairs) / 1e9,
        handoff_gb_s=statistics.median(o for _, o in pairs) / 1e9,
        ratio=statistics.median(o / p for p, o in pairs),
        one_block_us=statistics.median(singles),
        checksum=options.checksum,
        transports=transports,
    )


def _format(row: BenchRow) -> str:
    size = f"{row.block_bytes // _KIB} KiB"
    speeds = f"{row.perftest_gb_s:>10.2f} {row.handoff_gb_s:>10.2f} {row.ratio:>7.2f} {row.one_block_us:>9.0f}"
    return f"{row.tls:>8} {size:>10} {speeds}  {row.transports}"


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    defaults = TransferBenchOptions()
    parser = argparse.ArgumentParser(prog="kvbaton bench transfer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(defaults.sizes), help="block sizes in bytes")
    parser.add_argument("--tls", nargs="+", default=list(defaults.tls), help="UCX_TLS settings")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--megabytes", type=int, default=defaults.megabytes, help="moved per round and size")
    parser.add_argument("--checksum", choices=CHECKSUMS, default=CHECKSUM_OFF, help="of each block, at both ends")
    parser.add_argument("--json", type=Path, default=None, help="write the rows there")
    given = parser.parse_args(argv)
    options = TransferBenchOptions(
        tuple(given.sizes), tuple(given.tls), given.rounds, given.megabytes, checksum=given.checksum
    )
    sys.stdout.write(
        f"{'UCX_TLS':>8} {'block':>10} {'perftest':>10} {'hand-off':>10} {'ratio':>7} {'1 block':>9}  transports\n"
        f"{'':>8} {'':>10} {'GB/s':>10} {'GB/s':>10} {'':>7} {'us':>9}\n"
    )
    rows = measure(options, sys.stdout)
    if given.json is not None:
        command = " ".join(["kvbaton bench transfer", *argv])
        result = {"command": command, "cpus": os.cpu_count(), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
