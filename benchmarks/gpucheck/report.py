"""What was measured, as values, JSON and markdown. Nothing here touches a device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpucheck.checks import CheckResult
from gpucheck.floors import BLOCKS_GOAL, Ceilings

NOT_RUN = "*not run on a GPU*"


@dataclass(frozen=True, slots=True)
class Skipped:
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """`step_s` is what the host sees, tokens included; the parts are graphs of their own."""

    model: str
    batch: int
    context: int
    step_s: float
    floor_s: float
    goal: float
    graph_s: float
    weights_s: float
    attention_s: float
    rest_s: float
    first_s: float

    @property
    def over_floor(self) -> float:
        return self.step_s / self.floor_s

    @property
    def gaps_s(self) -> float:
        """Of the step, what no kernel accounts for: launches, the host between steps, the way of the tokens."""
        return self.step_s - self.weights_s - self.attention_s - self.rest_s

    @property
    def met(self) -> bool:
        return self.over_floor <= self.goal


@dataclass(frozen=True, slots=True)
class PrefillResult:
    model: str
    tokens: int
    chunk: int
    seconds: float
    flop: int
    floor_s: float
    goal: float

    @property
    def share(self) -> float:
        """Of the measured matmul rate."""
        return self.floor_s / self.seconds

    @property
    def met(self) -> bool:
        """The goal is set at 8k; shorter prompts are reported only."""
        return self.share >= self.goal or self.tokens < 8192


@dataclass(frozen=True, slots=True)
class OverlapResult:
    """Seconds a decode step of a running worker: `device_s` is the device's own work, the others what passes from one
    step to the next, each waited for before the next is scheduled (`alone_s`) or overlapping."""

    model: str
    batch: int
    context: int
    device_s: float
    alone_s: float
    overlapped_s: float

    @property
    def alone_gap_s(self) -> float:
        return self.alone_s - self.device_s

    @property
    def overlapped_gap_s(self) -> float:
        return self.overlapped_s - self.device_s


@dataclass(frozen=True, slots=True)
class BlockResult:
    model: str
    what: str
    block_bytes: int
    moved_bytes: int
    seconds: float
    copy_bytes_s: float

    @property
    def share(self) -> float:
        return self.moved_bytes / self.seconds / self.copy_bytes_s

    @property
    def met(self) -> bool:
        return self.share >= BLOCKS_GOAL


@dataclass(frozen=True, slots=True)
class DrawResult:
    kind: str
    rows: int
    vocab: int
    seconds: float


@dataclass
class Report:
    """Grows section by section, and can be written at any time: a run that is cut short leaves what it had."""

    command: str
    machine: dict[str, str]
    seed: int
    checks: list[CheckResult] = field(default_factory=list)
    ceilings: Ceilings | None = None
    decode: list[DecodeResult] = field(default_factory=list)
    overlap: list[OverlapResult] = field(default_factory=list)
    prefill: list[PrefillResult] = field(default_factory=list)
    chunks: list[PrefillResult] = field(default_factory=list)
    blocks: list[BlockResult] = field(default_factory=list)
    draws: list[DrawResult] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    problems: list[Skipped] = field(default_factory=list)
    finished: bool = False

    @property
    def passed(self) -> bool:
        """Every check was right and every section ran to its end. Goals are reported, not enforced."""
        return all(check.passed for check in self.checks) and not self.problems

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu_check.json", self.json()), ("gpu_check.md", self.markdown())):
            part = folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)

    def json(self) -> str:
        values = asdict(self)
        for name in ("decode", "overlap", "prefill", "chunks", "blocks", "checks"):
            for value, item in zip(values[name], getattr(self, name), strict=True):
                value.update(_derived(item))
        values["passed"] = self.passed
        return json.dumps(_finite(values), indent=1) + "\n"

    def markdown(self) -> str:
        parts = ["# GPU check", "", f"`{self.command}`", ""]
        parts += [f"- {name}: {value}" for name, value in self.machine.items()]
        parts += [f"- seed: {self.seed}", f"- finished: {'yes' if self.finished else 'no: cut short'}", ""]
        if self.machine.get("device", "cpu") == "cpu":
            parts += [f"{NOT_RUN}: these figures try the program out, and say nothing of any device.", ""]
        for section in (_ceilings, _decode, _overlap, _prefill, _chunks, _blocks, _draws, _checks, _notes):
            parts += section(self)
        return "\n".join(parts) + "\n"


def _derived(item: Any) -> dict[str, Any]:
    names = ("over_floor", "gaps_s", "alone_gap_s", "overlapped_gap_s", "share", "met", "passed")
    return {name: getattr(item, name) for name in names if hasattr(type(item), name)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Nothing for no rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    if not body:
        return []
    return [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body, ""]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _ceilings(report: Report) -> list[str]:
    found = report.ceilings
    if found is None:
        return []
    rows = [
        ("copy, bytes read and written", f"{found.copy_bytes_s / 1e9:.0f} GB/s"),
        ("bfloat16 product", f"{found.matmul_flop_s / 1e12:.1f} TFLOP/s"),
    ]
    return table("Measured ceilings", ("what", "rate"), rows)


def _decode(report: Report) -> list[str]:
    columns = ("model", "batch", "context", "step ms", "floor ms", "step / floor", "goal", "met")
    head = (*columns, "graph", "weights", "attention", "rest", "gaps", "tokens/s")
    rows = [
        (
            r.model, str(r.batch), str(r.context), _ms(r.step_s), _ms(r.floor_s), f"{r.over_floor:.2f}",
            f"{r.goal:.2f}", _yes(r.met), *map(_ms, (r.graph_s, r.weights_s, r.attention_s, r.rest_s, r.gaps_s)),
            f"{r.batch / r.step_s:.0f}",
        )
        for r in report.decode
    ]  # fmt: skip
    return table("Decode steps", head, rows)


def _overlap(report: Report) -> list[str]:
    head = ("model", "batch", "context", "device ms", "alone ms", "gap", "overlapping ms", "gap")
    rows = [
        (
            r.model, str(r.batch), str(r.context),
            *map(_ms, (r.device_s, r.alone_s, r.alone_gap_s, r.overlapped_s, r.overlapped_gap_s)),
        )
        for r in report.overlap
    ]  # fmt: skip
    return table("Steps of a worker, each alone and overlapping", head, rows)


def _prefill(report: Report) -> list[str]:
    return _prefill_table("Prefill", report.prefill)


def _chunks(report: Report) -> list[str]:
    return _prefill_table("Chunk sizes", report.chunks)


def _prefill_table(title: str, results: list[PrefillResult]) -> list[str]:
    head = ("model", "tokens", "chunk", "ms", "TFLOP/s", "of matmul rate", "goal at 8k", "met")
    rows = [
        (
            r.model, str(r.tokens), str(r.chunk), _ms(r.seconds), f"{r.flop / r.seconds / 1e12:.1f}",
            f"{r.share:.0%}", f"{r.goal:.0%}", _yes(r.met),
        )
        for r in results
    ]  # fmt: skip
    return table(title, head, rows)


def _blocks(report: Report) -> list[str]:
    rows = [
        (r.model, r.what, f"{r.block_bytes}", f"{r.moved_bytes / r.seconds / 1e9:.0f}", f"{r.share:.0%}", _yes(r.met))
        for r in report.blocks
    ]
    return table("Block copies", ("model", "what", "block bytes", "GB/s", "of copy rate", "met"), rows)


def _draws(report: Report) -> list[str]:
    rows = [(r.kind, str(r.rows), str(r.vocab), _ms(r.seconds)) for r in report.draws]
    return table("Drawing tokens", ("kind", "rows", "vocab", "ms"), rows)


def _checks(report: Report) -> list[str]:
    rows = [
        (c.name, f"{c.error:.2e}", f"{c.limit:.0e}", "passed" if c.passed else "**FAILED**", c.detail)
        for c in report.checks
    ]
    return table("Checks against float64", ("check", "error", "limit", "", ""), rows)


def _notes(report: Report) -> list[str]:
    lines = [f"- not measured: {item.what}: {item.why}" for item in report.skipped]
    for item in [*report.problems, *(Skipped(c.name, c.problem) for c in report.checks if c.problem)]:
        lines += [f"- **failed**: {item.what}", "", "```", item.why.rstrip(), "```", ""]
    return ["## Notes", "", *lines, ""] if lines else []
