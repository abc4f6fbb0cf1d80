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
    command: str
    when: str
    cells: list[Cell]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def write_report(group: Group, cases: tuple[Case, ...], out: Path | None) -> None:
    """Prints the table; puts it among those in `out`, in the place of an older one of the same title."""
    print("\n".join(_section(group, cases)), flush=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cpu_peers.json"
    groups = {entry["title"]: entry for entry in (json.loads(path.read_text()) if path.exists() else [])}
    groups[group.title] = asdict(group) | {"title": group.title}
    kept = [groups[title] for title in sorted(groups)]
    path.write_text(json.dumps(kept, indent=1) + "\n")
    lines = []
    for entry in kept:
        fields = {name: value for name, value in entry.items() if name not in ("title", "cells")}
        lines += _section(Group(**fields, cells=[Cell(**cell) for cell in entry["cells"]]), cases)
    (out / "cpu_peers.md").write_text("\n".join(lines))


def _section(group: Group, cases: tuple[Case, ...]) -> list[str]:
    return [f"### {group.title}", "", f"`{group.command}`, {group.when}", "", *_table(group.cells, cases)]


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
