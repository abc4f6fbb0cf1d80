"""Cells of the side-by-side, and the table made of them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Case:
    """`sequences` prompts of `prompt_tokens`; one new token each asks for prefill alone."""

    name: str
    sequences: int
    prompt_tokens: int
    new_tokens: int

    def rates(self, answer: dict[str, float]) -> tuple[float, float]:
        """(tokens per wall second, tokens per CPU second): of the prompts, or of what follows the first tokens."""
        if self.new_tokens == 1:
            tokens, wall, cpu = self.sequences * self.prompt_tokens, answer["first_wall"], answer["first_cpu"]
        else:
            tokens = self.sequences * (self.new_tokens - 1)
            wall, cpu = answer["wall"] - answer["first_wall"], answer["cpu"] - answer["first_cpu"]
        return tokens / wall, tokens / max(cpu, 1e-9)


@dataclass(slots=True)
class Cell:
    """One peer in one table: its samples by case."""

    peer: str
    version: str
    skipped: str = ""
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, case: Case, answer: dict[str, float]) -> None:
        self.samples.setdefault(case.name, []).append(case.rates(answer))

    def median(self, case: Case, which: int) -> float | None:
        values = [sample[which] for sample in self.samples.get(case.name, [])]
        return statistics.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Group:
    """One table: peers that ran interleaved."""

    model: str
    dtype: str
    threads: int
    runs: list[str]  # command, date and load of each
    cells: list[Cell]

    def joined(self, other: Group) -> Group:
        """Both groups' samples; a peer whose version changed keeps only the newer ones, those of `other`."""
        cells = {cell.peer: cell for cell in self.cells}
        for cell in other.cells:
            before = cells.get(cell.peer)
            if before is None or (cell.samples and before.version != cell.version):
                cells[cell.peer] = cell
                continue
            before.skipped = cell.skipped
            for name, samples in cell.samples.items():
                before.samples.setdefault(name, []).extend(samples)
        return Group(self.model, self.dtype, self.threads, self.runs + other.runs, list(cells.values()))

    @property
    def title(self) -> str:
        return f"{self.model}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def write_report(group: Group, cases: tuple[Case, ...], out: Path | None, more: bool) -> None:
    """Prints the table and puts it among those in `out`, in the place of one of the same title, or added to it."""
    groups: dict[str, Group] = {}
    if out is not None and (out / "cpu_peers.json").exists():
        for entry in json.loads((out / "cpu_peers.json").read_text()):
            known = Group(**entry | {"cells": [Cell(**cell) for cell in entry["cells"]]})
            groups[known.title] = known
    before = groups.get(group.title)
    groups[group.title] = group if before is None or not more else before.joined(group)
    print("\n".join(_section(groups[group.title], cases)), flush=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    kept = [groups[title] for title in sorted(groups)]
    (out / "cpu_peers.json").write_text(json.dumps([asdict(entry) for entry in kept], indent=1) + "\n")
    (out / "cpu_peers.md").write_text("\n".join(line for entry in kept for line in _section(entry, cases)))


def _section(group: Group, cases: tuple[Case, ...]) -> list[str]:
    return [f"### {group.title}", "", *(f"- {run}" for run in group.runs), "", *_table(group.cells, cases)]


def _table(group: list[Cell], cases: tuple[Case, ...]) -> list[str]:
    """Tokens per second, wall / CPU; the last row is kvbaton over the best peer."""
    lines = ["| | " + " | ".join(case.name for case in cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for cell in group:
        if not cell.samples:
            continue
        figures = [_pair(cell.median(case, 0), cell.median(case, 1)) for case in cases]
        lines.append(f"| {cell.peer} {cell.version} | " + " | ".join(figures) + " |")
    lines.append("| **kvbaton / best peer** | " + " | ".join(_ratio(group, case) for case in cases) + " |")
    lines += ["", *(f"- {cell.peer} skipped: {cell.skipped}" for cell in group if cell.skipped), ""]
    return lines


def _pair(wall: float | None, cpu: float | None) -> str:
    return "–" if wall is None or cpu is None else f"{wall:.0f} / {cpu:.0f}"


def _ratio(group: list[Cell], case: Case) -> str:
    own = next((cell for cell in group if cell.peer == "kvbaton"), None)
    ratios = []
    for which in (0, 1):
        mine = own.median(case, which) if own else None
        theirs = [value for cell in group if cell is not own and (value := cell.median(case, which)) is not None]
        ratios.append(f"{mine / max(theirs):.2f}" if mine is not None and theirs else "–")
    return " / ".join(ratios)
