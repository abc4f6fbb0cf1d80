"""Compares the ratios that matter with those of the last accepted run. Not part of `make test`: it takes minutes.

    python benchmarks/guard.py                 # exit status 1 when a ratio is worse than accepted, by a quarter or more
    python benchmarks/guard.py --accept        # run, and make this run's ratios the accepted ones

Each figure is a ratio of two things measured side by side in one run, or a share that no clock decides, so a
slow or busy machine does not move it much. Accepted ratios belong to a kind of machine:
docs/results/<machine>/guard.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ACCEPTED = HERE.parent / "docs" / "results" / "cpu-2core" / "guard.json"
TOLERANCE = 0.25


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio. `more_is_better`: of a speed over a yardstick; otherwise a time, cost or waste over one."""

    name: str
    value: float
    more_is_better: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark that writes JSON to the file that `--json` names, and what is read from it."""

    name: str
    command: tuple[str, ...]
    read: Callable[[dict[str, Any]], list[Figure]]


def _transfer(result: dict[str, Any]) -> list[Figure]:
    rows = result["rows"]
    return [Figure(f"hand-off / perftest, {r['tls']}, {r['block_bytes'] >> 10} KiB", r["ratio"], True) for r in rows]


def _floors(result: dict[str, Any]) -> list[Figure]:
    return [Figure(f"step / floor, {name}", ratio, False) for name, ratio in result["time_over_floor"].items()]


def _serving(result: dict[str, Any]) -> list[Figure]:
    streams = result["streams"]
    ours, client = streams["cpu_ms_per_token"], streams["client_us_per_token"] / 1e3
    return [Figure("serving path / load generator, CPU a token", ours / client, False)]


def _memory(result: dict[str, Any]) -> list[Figure]:
    return [
        Figure("KV slots held but unused", result["waste"]["mean_waste"], False),
        Figure("prefill skipped for a repeated prefix", result["prefix"]["skipped_share"], True),
    ]


def _program(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *options)


PARTS = (
    Part("memory", _program("kv_waste.py", "--steps", "1000"), _memory),
    Part("transfer", (sys.executable, "-m", "kvbaton.kvtransfer.bench", "--rounds", "7"), _transfer),
    Part("floors", _program("cpu_floor.py", "--model", "llama-100m"), _floors),
    Part("serving", _program("serving_path.py"), _serving),
)


def measure(part: Part) -> list[Figure]:
    """Runs the benchmark. Raises CalledProcessError with its output shown."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        done = subprocess.run([*part.command, "--json", str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            done.check_returncode()
        return part.read(json.loads(file.read_text()))


def slack(figure: Figure, accepted: float) -> float:
    """How much better than accepted, as a share of it; negative is worse."""
    if not accepted:
        return 0.0 if not figure.value else -1.0
    return (figure.value / accepted - 1.0) * (1.0 if figure.more_is_better else -1.0)


def report(figures: list[Figure], accepted: dict[str, float], tolerance: float) -> int:
    """Prints the table; returns how many figures are worse than the tolerance allows."""
    worse = 0
    print(f"{'figure':52} {'now':>8} {'accepted':>9}")
    for figure in figures:
        line = f"{figure.name:52} {figure.value:8.3f}"
        if figure.name not in accepted:
            print(f"{line} {'new':>9}")
            continue
        gained = slack(figure, accepted[figure.name])
        failed = gained < -tolerance
        worse += failed
        print(f"{line} {accepted[figure.name]:9.3f} {gained:+7.0%}{'  WORSE' if failed else ''}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some of the benchmarks")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a ratio may be worse")
    parser.add_argument("--accept", action="store_true", help="write this run's ratios as the accepted ones")
    parser.add_argument("--file", type=Path, default=ACCEPTED, help="the accepted ratios")
    options = parser.parse_args()
    accepted: dict[str, float] = json.loads(options.file.read_text())["ratios"] if options.file.exists() else {}
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    figures = [figure for part in chosen for figure in measure(part)]
    worse = report(figures, accepted, options.tolerance)
    if options.accept:
        ratios = accepted | {figure.name: round(figure.value, 4) for figure in figures}
        body = {"command": "python benchmarks/guard.py --accept", "ratios": ratios}
        options.file.write_text(json.dumps(body, indent=2) + "\n")
        return 0
    if worse:
        print(f"{worse} of {len(figures)} worse than accepted by more than {options.tolerance:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
