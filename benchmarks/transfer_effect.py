"""What blocks that arrive over UCX do to the steps of the engine that decodes.

    python benchmarks/transfer_effect.py --json docs/results/cpu-2core/transfer_effect.json

A process decodes 8 sequences, step after step, and its transfer agent takes blocks from an agent in a second process,
as in a decode engine. Seconds with and without arriving blocks follow each other, so that growing contexts and other
work on the machine hit both alike; a ratio is that of the median steps of two neighbours, and the median ratio counts.

    prefill rate   as many bytes a second as one prefill engine of the same kind computes, timed at the start
    full speed     as fast as UCX moves them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_models import SHAPES, checkpoint, prompt

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.orders import LegKind, Submit, Submitted
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.kvtransfer.bench import BenchProcess
from kvbaton.kvtransfer.bench_peer import DecodeSide, HostBlocks

SEQUENCES, PROMPT_TOKENS = 8, 512
POOL_BLOCKS = 256
BLOCKS_EACH = 32


@dataclass(frozen=True, slots=True)
class Effect:
    """Steps are medians in ms; `step_ratio` is the median over pairs of neighbouring windows."""

    name: str
    gb_s: float
    quiet_ms: float
    moving_ms: float
    step_ratio: float


class DecodingProcess:
    """This program again, with `--decode`: an engine that steps when told to."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--decode", "--model", options.model, "--dtype", options.dtype]
        env = {**os.environ, "UCX_TLS": options.tls}
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the decoding process ended with {self._process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def decode(options: argparse.Namespace) -> None:
    """The decoding process: prefills once, says how fast; then a line with seconds in, the steps' seconds out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # UCX writes its log to stdout
    configure_threads(1)
    limits = BatchConfig(max_tokens_per_step=SEQUENCES * PROMPT_TOKENS)
    cache = CacheConfig(kv_memory_bytes=2 << 30, prefix_cache=False)
    folder = checkpoint(options.model, options.dtype)
    engine = Engine.load(EngineConfig(folder, dtype=options.dtype, cache=cache, batch=limits))
    worker = Worker(engine, None, limits)  # type: ignore[arg-type]  # no hand-off comes through the worker
    side = DecodeSide(HostBlocks(POOL_BLOCKS, engine.geometry.block_bytes), "off")
    for i in range(SEQUENCES + 1):  # the first alone: what is built or touched once
        sampling = SamplingParams(max_tokens=1 if i == 0 else 3000, temperature=0.0, ignore_eos=True)
        request = Request(f"r{i}", tuple(prompt(i, PROMPT_TOKENS, engine.vocab_size)), sampling, (0,))
        worker.handle(Submitted(1, Submit(request, LegKind.LOCAL, None)), 0.0)
        if i == 0:
            _step_s(worker)
    prefill_s = _step_s(worker)
    tokens_s = SEQUENCES * PROMPT_TOKENS / prefill_s
    about = {"port": side.agent.address().port, "block_bytes": engine.geometry.block_bytes, "tokens_s": tokens_s}
    about["block_size"] = engine.geometry.block_size
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        end = time.perf_counter() + float(line)
        steps = []
        while time.perf_counter() < end:
            steps.append(_step_s(worker))
        print(json.dumps(steps), file=answers, flush=True)
    side.agent.close()


def _step_s(worker: Worker) -> float:
    started = time.perf_counter()
    if not worker.step(0.0):
        raise RuntimeError("nothing left to decode: fewer pairs or shorter windows")
    worker.take_outputs()
    return time.perf_counter() - started


class Mover:
    """Hands off blocks from a second process, at a pace, while it is told to."""

    def __init__(self, about: dict[str, Any], tls: str) -> None:
        self._block_bytes = about["block_bytes"]
        self._run = {"do": "run", "port": about["port"], "blocks_each": BLOCKS_EACH, "concurrent": 2}
        self._process = BenchProcess(tls)
        self._process.ask(
            do="open", num_blocks=POOL_BLOCKS, block_bytes=self._block_bytes, checksum="off", side="prefill"
        )
        self._process.ask(**self._run, handoffs=2)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.moved_bytes, self.seconds = 0, 0.0

    def start(self, bytes_s: float | None) -> None:
        """`bytes_s` None: as fast as it goes."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._move, args=(bytes_s,))
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _move(self, bytes_s: float | None) -> None:
        started, moved = time.perf_counter(), 0
        handoffs = 8 if bytes_s is None else 1
        each = (handoffs + 2) * BLOCKS_EACH * self._block_bytes  # a run warms up with two hand-offs of its own
        while not self._stopping.is_set():
            self._process.ask(**self._run, handoffs=handoffs)
            moved += each
            if bytes_s is not None:
                self._stopping.wait(max(0.0, started + moved / bytes_s - time.perf_counter()))
        self.moved_bytes += moved
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        self._process.ask(do="close")
        self._process.stop()


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Effect]]:
    process = DecodingProcess(options)
    about = process.answer()
    bytes_s = about["tokens_s"] * about["block_bytes"] / about["block_size"]
    effects = []
    for name, pace in (("prefill rate", bytes_s), ("full speed", None)):
        mover = Mover(about, options.tls)
        pairs = []
        for _ in range(options.pairs):
            quiet = statistics.median(process.ask(str(options.seconds)))
            mover.start(pace)
            moving = statistics.median(process.ask(str(options.seconds)))
            mover.stop()
            pairs.append((quiet, moving))
        effects.append(
            Effect(
                name=name,
                gb_s=mover.moved_bytes / mover.seconds / 1e9,
                quiet_ms=statistics.median(quiet for quiet, _ in pairs) * 1e3,
                moving_ms=statistics.median(moving for _, moving in pairs) * 1e3,
                step_ratio=statistics.median(moving / quiet for quiet, moving in pairs),
            )
        )
        mover.close()
    process.stop()
    return about, effects


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-100m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tls", default="all", help="UCX_TLS of both processes")
    parser.add_argument("--pairs", type=int, default=12, help="of windows, without and with arriving blocks")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode(options)
        return 0
    about, effects = measure(options)
    print(f"{options.model} {options.dtype}, {SEQUENCES} sequences, UCX_TLS={options.tls}")
    for e in effects:
        line = f"{e.name:13} {e.gb_s:6.2f} GB/s   step {e.quiet_ms:.2f} -> {e.moving_ms:.2f} ms   {e.step_ratio:.3f}"
        print(line)
    if options.json:
        command = "python benchmarks/transfer_effect.py " + " ".join(sys.argv[1:])
        body = {"command": command, "cpus": os.cpu_count(), **about, "effects": [asdict(e) for e in effects]}
        options.json.write_text(json.dumps(body, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
