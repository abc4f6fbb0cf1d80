"""How far the engine on this CPU is from what the machine can do, and where a step's time goes.

    python benchmarks/cpu_floor.py --model qwen3-0.6b --dtype bfloat16 --threads 1
    python benchmarks/cpu_floor.py --model qwen3-0.6b --quantization int8      # beside plain weights, in turn

First the ceilings, measured: bytes read a second (the best of several ways to walk through memory), multiply-adds a
second. Then the real step (scheduler, runner, sampler) on random weights. Floor of a decode step: the larger of weights
and KV over the read rate, and operations over the multiply rate; of prefill: operations over the multiply rate. Times
are wall times: `best` of the fastest step, whose parts are listed, and the median; `cpu` is the median CPU time.
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
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_models import SHAPES, checkpoint, matrix_elements, prompt

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine import runner as runner_module
from kvbaton.engine.batch import SampledToken
from kvbaton.engine.config import QUANTIZATIONS, BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.model.native_decoder import NativeDecoder
from kvbaton.engine.orders import LegKind, Submit, Submitted
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

    def __init__(self, model: str, dtype: str, threads: int, quantization: str) -> None:
        configure_threads(threads)
        self.quantization = quantization
        self.weight_bytes = 1 if quantization == "int8" else BYTES[dtype]  # of one element
        batch = BatchConfig(max_tokens_per_step=4096)
        cache = CacheConfig(kv_memory_bytes=2 << 30, prefix_cache=False)
        config = EngineConfig(
            checkpoint(model, dtype), dtype=dtype, cache=cache, batch=batch, quantization=quantization
        )
        self.engine = Engine.load(config)
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
            self.worker.handle(Submitted(1, Submit(request, LegKind.LOCAL, None)), 0.0)

    def steps(self) -> list[dict[str, float]]:
        """Runs until nothing is left; each step's parts, with `total`, `cpu` and `python`."""
        found = []
        while True:
            self.watch.spent = {}
            started, cpu = time.perf_counter(), time.process_time()
            ran = self.worker.step(0.0)
            self.worker.take_outputs()
            if not ran:
                return found
            spent = self.watch.spent
            total = time.perf_counter() - started
            spent["python"] = total - sum(spent.values())
            spent |= {"total": total, "cpu": time.process_time() - cpu}
            found.append(spent)


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens` computed a step, `rows` of them drawn from, over `context` cached tokens in all."""

    name: str
    sequences: int
    length: int
    new_tokens: int
    tokens: int
    context: int

    def run(self, bench: Bench) -> list[dict[str, float]]:
        """The steps that count: of decode, those after the prompt's."""
        bench.submit(self.sequences, self.length, self.new_tokens)
        return bench.steps()[min(self.new_tokens - 1, 1) :]

    def floor_s(self, bench: Bench, dtype: str, top: Ceilings) -> float:
        config = bench.engine.model_config
        drawn = config.vocab_size * config.hidden_size
        inner = matrix_elements(config) - drawn
        bytes_read = (inner + drawn) * bench.weight_bytes + self.context * bench.engine.geometry.token_bytes
        attention = 4 * config.num_layers * config.q_size * self.context * self.tokens / self.sequences
        operations = 2 * (inner * self.tokens + drawn * self.sequences) + attention
        return max(bytes_read / top.read, operations / top.multiply)


def cases(args: argparse.Namespace) -> list[Case]:
    length, new = 128, args.new_tokens
    decodes = [Case(f"decode {n}", n, length, new, n, n * (length + new // 2)) for n in args.batches]
    prefills = [Case(f"prefill {n} x 512", n, 512, 1, 512 * n, 256 * n) for n in args.prompts]
    return decodes + prefills


def report(name: str, steps: list[dict[str, float]], floor: float) -> dict[str, Any]:
    order = ("products", "logits", "attention", "rope and KV write", "norms", "embedding", "sampling", "call", "python")
    best = min(steps, key=lambda step: step["total"])
    median, cpu = (statistics.median(step[what] for step in steps) for what in ("total", "cpu"))
    parts = {part: best.get(part, 0.0) for part in order}
    print(
        f"{name:22} floor {floor * 1e3:8.2f} ms  best {best['total'] * 1e3:8.2f} ({best['total'] / floor:.2f} x)  "
        f"median {median * 1e3:8.2f} ({median / floor:.2f} x)  cpu {cpu * 1e3:8.2f}\n{'':22} "
        + "  ".join(f"{part} {seconds * 1e3:.2f}" for part, seconds in parts.items()),
        flush=True,
    )
    times = {"best_s": best["total"], "median_s": median, "median_cpu_s": cpu}
    return {"case": name, "floor_s": floor, **times, "parts_of_best_s": parts}


def measure(benches: list[Bench], dtype: str, top: Ceilings, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each case on each engine in turn, `--rounds` or `--prefills` times."""
    rows = []
    for case in cases(args):
        steps: list[list[dict[str, float]]] = [[] for _ in benches]
        for _ in range(args.prefills if case.new_tokens == 1 else args.rounds):
            for bench, found in zip(benches, steps, strict=True):
                found += case.run(bench)
        for bench, found in zip(benches, steps, strict=True):
            name = case.name if bench.quantization == "none" else f"{case.name} {bench.quantization}"
            rows.append(report(name, found, case.floor_s(bench, dtype, top)))
    return rows


def gains(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How much faster each case is with 8-bit weights than with plain ones: 2.0 is twice as fast."""
    by_case = {row["case"]: row for row in rows}
    pairs = {name: (row, by_case[f"{name} int8"]) for name, row in by_case.items() if f"{name} int8" in by_case}
    times = ("best_s", "median_s", "median_cpu_s")
    return {name: {what: plain[what] / int8[what] for what in times} for name, (plain, int8) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-100m")
    parser.add_argument("--dtype", choices=list(BYTES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="int8: both, in turn")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="how often each decode case runs")
    parser.add_argument("--prompts", nargs="*", type=int, default=[1, 8], help="prompts of 512 tokens at once")
    parser.add_argument("--prefills", type=int, default=3, help="how often each prompt case runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    top = ceilings(args.dtype, args.threads)
    kinds = ["none"] if args.quantization == "none" else ["none", args.quantization]
    benches = [Bench(args.model, args.dtype, args.threads, kind) for kind in kinds]
    sizes = [matrix_elements(bench.engine.model_config) * bench.weight_bytes / 1e6 for bench in benches]
    print(
        f"{args.model} {args.dtype} {args.threads} threads: {' and '.join(f'{size:.0f}' for size in sizes)} MB of "
        f"weights a step; measured ceilings: read {top.read / 1e9:.1f} GB/s, multiply {top.multiply / 1e9:.0f} GFLOP/s"
    )
    rows = measure(benches, args.dtype, top, args)
    for name, gain in gains(rows).items():
        print(f"{name:22} int8 is faster by: " + ", ".join(f"{what} {value:.2f}" for what, value in gain.items()))
    if args.json:
        result = {
            "command": f"python {' '.join(sys.argv)}",
            "date": str(datetime.date.today()),
            "load_average": os.getloadavg()[0],
            "read_bytes_per_s": top.read,
            "multiply_operations_per_s": top.multiply,
            "time_over_floor": {row["case"]: row["best_s"] / row["floor_s"] for row in rows},
            "int8_times_faster": gains(rows),
            "steps": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
