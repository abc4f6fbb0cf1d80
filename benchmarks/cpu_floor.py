"""How far the engine on this CPU is from what the machine can do, and where a step's time goes.

    python benchmarks/cpu_floor.py --model qwen3-0.6b --dtype bfloat16 --threads 1

First the ceilings, measured: bytes read a second (the best of several ways to walk through memory), multiply-adds a
second. Then the real step (scheduler, runner, sampler) on random weights. Floor of a decode step: the larger of weights
and KV over the read rate, and operations over the multiply rate; of prefill: operations over the multiply rate. Times
are wall times: `best` of the fastest step, whose parts are listed, and the median.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_models import SHAPES, checkpoint, matrix_elements, prompt

from kvbaton.cluster.session_types import Leg, Submit
from kvbaton.cluster.worker import Worker
from kvbaton.cluster.worker_types import Submitted
from kvbaton.engine import runner as runner_module
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.model_config import ModelConfig
from kvbaton.engine.native_decoder import NativeDecoder
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.kernels.host_memory import zeroed_memory
from kvbaton.kernels.native_lib import PHASES

PRODUCTS = ("qkv", "out", "gate and up", "down")
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`read` bytes/s and `multiply` operations/s, of `threads` threads together."""

    read: float
    multiply: float


def ceilings(dtype: str, threads: int) -> Ceilings:
    """The best of several tries: other processes only make them worse."""
    with tempfile.TemporaryDirectory() as folder:
        library_path = Path(folder) / "rates.so"
        source = Path(__file__).resolve().parent / "rates.c"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-lpthread"]
        subprocess.run(["gcc", str(source), "-o", str(library_path), *flags], check=True)
        library = ctypes.CDLL(str(library_path))
    library.read_seconds.restype = library.multiply_rate.restype = ctypes.c_double
    library.read_seconds.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    library.multiply_rate.argtypes = (ctypes.c_int, ctypes.c_long)
    size = 1 << 29
    buffer = zeroed_memory(size).fill_(1)
    walks = [(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 4096, 8192, 16384)] * 6
    read = max(size / library.read_seconds(buffer.data_ptr(), size, threads, *walk) for walk in walks)
    wanted = 1 if dtype == "bfloat16" else 0
    rate = max(library.multiply_rate(wanted, 2_000_000) for _ in range(5))
    rate = rate or max(library.multiply_rate(0, 2_000_000) for _ in range(5))
    return Ceilings(read, rate * threads)


class Stopwatch:
    """Wall time of one step's parts, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds


class TimedDecoder:
    """Stands before the engine's decoder and measures its calls."""

    def __init__(self, decoder: NativeDecoder, watch: Stopwatch) -> None:
        self._decoder, self._watch, self.device = decoder, watch, decoder.device

    def forward(self, *args: object) -> torch.Tensor:
        self._decoder.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
        started = time.perf_counter()
        hidden = self._decoder.forward(*args)  # type: ignore[arg-type]
        total = time.perf_counter() - started
        phases = dict(zip(PHASES, self._decoder.seconds.tolist(), strict=True))
        for name, seconds in phases.items():
            self._watch.add("products" if name in PRODUCTS else name, seconds)
        self._watch.add("call", total - sum(phases.values()))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        logits = self._decoder.logits(hidden)
        self._watch.add("logits", time.perf_counter() - started)
        return logits

    def __getattr__(self, name: str) -> object:
        return getattr(self._decoder, name)


class Bench:
    """An engine with its worker, driven by hand; `steps` are the parts of each step."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        configure_threads(threads)
        batch = BatchConfig(max_tokens_per_step=4096)
        cache = CacheConfig(kv_memory_bytes=2 << 30, prefix_cache=False)
        self.engine = Engine.load(EngineConfig(checkpoint(model, dtype), dtype=dtype, cache=cache, batch=batch))
        self.engine.cache.pool.zero_()  # memory that has been used before, as after the first minute of a server
        self.worker = Worker(self.engine, None, batch)  # type: ignore[arg-type]
        self.watch = Stopwatch()
        decoder = self.engine._runner._decoder
        if not isinstance(decoder, NativeDecoder):
            raise SystemExit("there is no native library here; see the log")
        self.engine._runner._decoder = TimedDecoder(decoder, self.watch)  # type: ignore[assignment]
        sample = runner_module.sample_tokens

        def timed(*args: object) -> list[SampledToken]:
            started = time.perf_counter()
            result = sample(*args)  # type: ignore[arg-type]
            self.watch.add("sampling", time.perf_counter() - started)
            return result

        runner_module.sample_tokens = timed  # type: ignore[assignment]

    def submit(self, sequences: int, length: int, new_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for i in range(sequences):
            request = Request(f"r{i}", tuple(prompt(i, length, self.engine.vocab_size)), sampling, (0,))
            self.worker.handle(Submitted(1, Submit(request, Leg.LOCAL, None)), 0.0)

    def steps(self) -> list[dict[str, float]]:
        """Runs until nothing is left; each step's parts, with `total` and `python`."""
        found = []
        while True:
            self.watch.spent = {}
            started = time.perf_counter()
            ran = self.worker.step(0.0)
            self.worker.take_outputs()
            if not ran:
                return found
            spent = self.watch.spent
            total = time.perf_counter() - started
            spent["python"] = total - sum(spent.values())
            spent["total"] = total
            found.append(spent)


def floor_s(config: ModelConfig, dtype: str, tokens: int, rows: int, context: int, top: Ceilings) -> float:
    """`tokens` computed, `rows` of them drawn from, over `context` cached tokens in all."""
    drawn = config.vocab_size * config.hidden_size
    inner = matrix_elements(config) - drawn
    kv_bytes = context * config.kv_bytes_per_token(BYTES[dtype])
    operations = 2 * (inner * tokens + drawn * rows) + 4 * config.num_layers * config.q_size * context * tokens / rows
    return max(((inner + drawn) * BYTES[dtype] + kv_bytes) / top.read, operations / top.multiply)


def report(name: str, steps: list[dict[str, float]], floor: float) -> dict[str, object]:
    order = ("products", "logits", "attention", "rope and KV write", "norms", "embedding", "sampling", "call", "python")
    best = min(steps, key=lambda step: step["total"])
    median = statistics.median(step["total"] for step in steps)
    parts = {part: best.get(part, 0.0) for part in order}
    print(
        f"{name:16} floor {floor * 1e3:8.2f} ms  best {best['total'] * 1e3:8.2f} ({best['total'] / floor:.2f} x)  "
        f"median {median * 1e3:8.2f} ({median / floor:.2f} x)\n{'':16} "
        + "  ".join(f"{part} {seconds * 1e3:.2f}" for part, seconds in parts.items()),
        flush=True,
    )
    return {"case": name, "floor_s": floor, "best_s": best["total"], "median_s": median, "parts_of_best_s": parts}


def measure(bench: Bench, dtype: str, top: Ceilings, args: argparse.Namespace) -> list[dict[str, object]]:
    config, rows = bench.engine.model_config, []
    for batch in args.batches:
        bench.submit(batch, 128, args.new_tokens)
        context = batch * (128 + args.new_tokens // 2)
        floor = floor_s(config, dtype, batch, batch, context, top)
        rows.append(report(f"decode {batch}", bench.steps()[1:], floor))
    for sequences in (1, 8):
        steps = []
        for _ in range(args.prefills):
            bench.submit(sequences, 512, 1)
            steps += bench.steps()
        floor = floor_s(config, dtype, 512 * sequences, sequences, 256 * sequences, top)
        rows.append(report(f"prefill {sequences} x 512", steps, floor))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-100m")
    parser.add_argument("--dtype", choices=list(BYTES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prefills", type=int, default=3, help="how often each prompt case runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    top = ceilings(args.dtype, args.threads)
    bench = Bench(args.model, args.dtype, args.threads)
    size = matrix_elements(bench.engine.model_config) * BYTES[args.dtype]
    print(
        f"{args.model} {args.dtype} {args.threads} threads: {size / 1e6:.0f} MB of weights a step; "
        f"measured ceilings: read {top.read / 1e9:.1f} GB/s, multiply {top.multiply / 1e9:.0f} GFLOP/s"
    )
    rows = measure(bench, args.dtype, top, args)
    if args.json:
        result = {
            "command": f"python {' '.join(sys.argv)}",
            "date": str(datetime.date.today()),
            "load_average": os.getloadavg()[0],
            "read_bytes_per_s": top.read,
            "multiply_operations_per_s": top.multiply,
            "time_over_floor": {row["case"]: row["best_s"] / row["floor_s"] for row in rows},
            "steps": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
