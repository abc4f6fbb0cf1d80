"""The split's own claim: one prefill + one decode engine against two hybrid engines, one thread each, same load.

    python benchmarks/split.py --rates 1 2 3 --out docs/results

The load is two kinds of requests, Poisson each: chats (short prompt, long answer), whose streams are running when long
prompts (long prompt, short answer) arrive. Both clusters get the same requests at the same times, in turn, several
rounds of each rate; the medians of the rounds are compared. Writes split.md, split.json and split.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kvbaton.engine.tiny import TinySpec, make_tiny

SPEC = TinySpec(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, check=False)
CLUSTERS = {
    "split": ("--prefill", "1", "--decode", "1"),
    "hybrid": ("--prefill", "0", "--decode", "0", "--hybrid", "2"),
}
FIGURES = ("itl_p50", "itl_p99", "ttft_p50", "ttft_p99", "goodput_share", "output_tokens_per_s")
READY_S = 180


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests of one kind."""

    share: float
    prompt_tokens: int
    output_tokens: int


CHAT = Mix(0.8, 96, 96)
LONG = Mix(0.2, 1600, 8)


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[float, list[dict[str, float]]]] = {name: {} for name in CLUSTERS}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny(model, SPEC)
        for round_ in range(options.rounds):
            for name in CLUSTERS if round_ % 2 == 0 else reversed(CLUSTERS):
                with serving(model, CLUSTERS[name], options.threads) as url:
                    for rate in options.rates:
                        trace = write_trace(Path(folder) / f"{rate}.csv", rate, options.seconds, seed=round_)
                        figures = run_load(url, trace, options.slo)
                        results[name].setdefault(rate, []).append(figures)
                        print(f"round {round_} {name:6} {rate:g}/s: {_line(figures)}", flush=True)
    medians = {name: {rate: _medians(runs) for rate, runs in rates.items()} for name, rates in results.items()}
    _write(options, medians, results)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="requests a second, all kinds")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--slo", default="ttft=2.0,tpot=0.05")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args()


@contextmanager
def serving(model: Path, pools: Sequence[str], threads: int) -> Iterator[str]:
    """`kvbaton serve` on a free port; yields its URL."""
    command = [sys.executable, "-m", "kvbaton.cluster.cli", "serve", "--model", str(model), "--port", "0"]
    command += ["--device", "cpu", "--threads", str(threads), *pools]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    url: list[str] = []
    ready = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"endpoint +(http://\S+)", line):
                url.append(found[1])
            if "Ctrl-C stops" in line:
                ready.set()
        ready.set()

    threading.Thread(target=follow, daemon=True).start()
    try:
        if not ready.wait(READY_S) or process.poll() is not None:
            raise RuntimeError(f"kvbaton serve did not start: {' '.join(command)}")
        yield url[-1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def write_trace(path: Path, rate: float, seconds: float, seed: int) -> Path:
    """Poisson arrivals of both kinds, as an Azure-style CSV; the same for both clusters."""
    rng = random.Random(f"{rate}/{seed}")
    start, at = datetime(2024, 1, 1, tzinfo=UTC), 0.0
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    while (at := at + rng.expovariate(rate)) < seconds:
        kind = CHAT if rng.random() < CHAT.share else LONG
        stamp = (start + timedelta(seconds=at)).strftime("%Y-%m-%d %H:%M:%S.%f0")
        lines.append(f"{stamp},{kind.prompt_tokens},{kind.output_tokens}")
    path.write_text("\n".join(lines) + "\n")
    return path


def run_load(url: str, trace: Path, slo: str) -> dict[str, float]:
    """One run of `kvbaton bench serve`; seconds."""
    report = trace.with_suffix(".json")
    command = [sys.executable, "-m", "kvbaton.cluster.cli", "bench", "serve", "--url", url, "--trace", str(trace)]
    subprocess.run([*command, "--slo", slo, "--json", str(report), "--no-progress"], check=True, capture_output=True)
    summary: dict[str, Any] = json.loads(report.read_text())["report"]["summary"]
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} requests failed at {url}")
    latency = summary["latency"]
    return {
        "itl_p50": latency["itl"]["p50"],
        "itl_p99": latency["itl"]["p99"],
        "ttft_p50": latency["ttft"]["p50"],
        "ttft_p99": latency["ttft"]["p99"],
        "goodput_share": summary["goodput"]["share"],
        "output_tokens_per_s": summary["throughput"]["output_tokens_per_s"],
    }


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in FIGURES}


def _line(figures: dict[str, float]) -> str:
    times = "  ".join(f"{name} {figures[name] * 1000:.0f} ms" for name in FIGURES[:4])
    return f"{times}  goodput {figures['goodput_share']:.0%}  {figures['output_tokens_per_s']:.0f} tokens/s"


def _write(options: argparse.Namespace, medians: dict[str, Any], results: dict[str, Any]) -> None:
    command = "python benchmarks/split.py " + " ".join(sys.argv[1:])
    body = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "chat": asdict(CHAT),
        "long": asdict(LONG),
        "medians": medians,
        "runs": results,
    }
    (options.out / "split.json").write_text(json.dumps(body, indent=1))
    (options.out / "split.md").write_text(_page(body, options))
    _plot(medians, options.out / "split.png")


def _page(body: dict[str, Any], options: argparse.Namespace) -> str:
    rows = []
    for rate in options.rates:
        for name in CLUSTERS:
            f = body["medians"][name][rate]
            cells = [f"{rate:g}", name, *(f"{f[key] * 1e3:.1f}" for key in FIGURES[:4])]
            cells += [f"{f['goodput_share']:.0%}", f"{f['output_tokens_per_s']:.0f}"]
            rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    return f"""# One prefill + one decode engine against two hybrid engines

`{body["command"]}`, {body["date"]}, {body["machine"]}. One thread an engine, a random model of 8 layers and 512 hidden
units; {CHAT.share:.0%} chats of {CHAT.prompt_tokens} + {CHAT.output_tokens} tokens, {LONG.share:.0%} prompts of
{LONG.prompt_tokens} + {LONG.output_tokens}; SLO {options.slo}; medians of {options.rounds} rounds in turn.
Ray's daemons, the ingress and the load generator share the cores with the engines.

| requests/s | cluster | ITL p50 ms | ITL p99 ms | TTFT p50 ms | TTFT p99 ms | goodput | tokens/s |
|---|---|---|---|---|---|---|---|
{table}

![p99 ITL, p99 TTFT and goodput over the rate](split.png)
"""


def _plot(medians: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("itl_p99", "p99 ITL, ms", 1e3), ("ttft_p99", "p99 TTFT, ms", 1e3), ("goodput_share", "goodput, %", 100))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name, marker in (("split", "o-"), ("hybrid", "s--")):
            rates = sorted(medians[name])
            axis.plot(rates, [medians[name][rate][key] * scale for rate in rates], marker, label=name)
        axis.set_xlabel("requests a second")
        axis.set_title(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
