"""What the chaos soak found: counts, what each process keeps, and whether that is acceptable."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from support.live_cluster import LiveCluster

SPARE_FILES = 4  # idle connections to the store that its client keeps
MAX_GROWTH_BYTES = 24 << 20  # of a process over the run: more than allocators' noise


@dataclass(frozen=True)
class Kept:
    """By one process; of an engine also its generation. `kinds`: its open files, such as sockets, counted."""

    generation: int
    files: int
    resident_bytes: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """After a calm phase, when nothing is in flight. `free_s`: how long that took to become true."""

    free_s: float
    processes: dict[str, Kept]


def resources_of(cluster: LiveCluster, free_s: float) -> Resources:
    kept = {name: _kept(engine.pid, engine.spec.generation) for name, engine in cluster.engines.items()}
    return Resources(free_s, kept | {"ingress": _kept(os.getpid(), 1)})


def _kept(pid: int, generation: int) -> Kept:
    kinds: Counter[str] = Counter()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            kinds[re.sub(r":\[\d+\]|\d+", "", str(file.readlink()))] += 1
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Kept(generation, kinds.total(), resident, dict(sorted(kinds.items())))


@dataclass(frozen=True)
class Report:
    seconds: float
    streams: dict[str, int]
    faults: dict[str, int]
    resumed: int
    before: Resources
    after: Resources

    def as_json(self) -> dict[str, Any]:
        return asdict(replace(self, streams=dict(self.streams), faults=dict(self.faults)))


def problems(report: Report, spared: str) -> list[str]:
    """Empty where all is well. Open files are compared for every process, memory where it lived through the run."""
    found = [f"{report.streams[kind]} requests {kind}" for kind in ("lost", "wrong") if report.streams[kind]]
    for name, after in report.after.processes.items():
        before = report.before.processes[name]
        if after.files > before.files + SPARE_FILES:
            more = Counter(after.kinds) - Counter(before.kinds)
            found.append(f"{name} has {after.files} open files, {before.files} before: {dict(more)}")
        growth = after.resident_bytes - before.resident_bytes
        if name in (spared, "ingress") and growth > MAX_GROWTH_BYTES:
            found.append(f"{name} has grown by {growth >> 20} MiB")
    return found


def table(report: Report) -> str:
    """Markdown."""
    streams = ", ".join(f"{count} {kind}" for kind, count in report.streams.items())
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(report.faults.items()))
    lines = [
        f"{report.seconds:.0f} s under faults",
        "",
        f"* requests: {streams}; {report.resumed} resumes",
        f"* faults: {faults}",
        f"* blocks held after the end: 0, {report.after.free_s:.2f} s after the last stream",
        "",
        "| process | generations | open files before, after | resident MiB before, after |",
        "|---|---|---|---|",
    ]
    for name, after in report.after.processes.items():
        before = report.before.processes[name]
        memory = f"{before.resident_bytes >> 20}, {after.resident_bytes >> 20}"
        lines.append(f"| {name} | {after.generation} | {before.files}, {after.files} | {memory} |")
    return "\n".join(lines)
