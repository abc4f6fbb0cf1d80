"""All that was measured, as JSON and markdown. Nothing here touches a device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpucheck.checks import CheckResult
from gpucheck.floors import Ceilings
from gpucheck.results import (
    AttentionResult,
    BlockResult,
    DecodeResult,
    DrawResult,
    LinearResult,
    LoadResult,
    OverlapResult,
    PrefillResult,
    Skipped,
)

NOT_RUN = "*not run on a GPU*"


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
    attention: list[AttentionResult] = field(default_factory=list)
    linear: list[LinearResult] = field(default_factory=list)
    draws: list[DrawResult] = field(default_factory=list)
    load: list[LoadResult] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    problems: list[Skipped] = field(default_factory=list)
    finished: bool = False

    @property
    def passed(self) -> bool:
        """Every check was right and every section ran to its end. Goals are reported, not enforced."""
        return all(check.passed for check in self.checks) and not self.problems

    def add(self, field: str, value: Any) -> None:
        """`field` is a list's name, or `ceilings`."""
        if field == "ceilings":
            self.ceilings = value
        else:
            getattr(self, field).append(value)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu_check.json", self.json()), ("gpu_check.md", self.markdown())):
            part = folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)

    def json(self) -> str:
        values = asdict(self)
        for name in ("decode", "overlap", "prefill", "chunks", "blocks", "attention", "linear", "load", "checks"):
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
        for section in (
            _ceilings,
            _decode,
            _overlap,
            _prefill,
            _chunks,
            _blocks,
            _attention,
            _linear,
            _draws,
            _checks,
            _notes,
        ):
            parts += section(self)
        return "\n".join(parts) + "\n"


def _derived(item: Any) -> dict[str, Any]:
    names = ("over_floor", "gaps_s", "alone_gap_s", "overlapped_gap_s", "share", "met", "passed")
    names += ("torch_over_ours", "int8_over_bfloat16", "eight_billion_s")
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
        (r.model, f"{r.block_bytes}", f"{r.moved_bytes / r.seconds / 1e9:.0f}", f"{r.share:.0%}", _yes(r.met))
        for r in report.blocks
    ]
    return table("Block copies", ("model", "block bytes", "GB/s", "of copy rate", "met"), rows)


def _attention(report: Report) -> list[str]:
    head = (
        "model",
        "queries",
        "context",
        "ours ms",
        "TFLOP/s",
        "torch ms",
        "gather ms",
        "torch + gather / ours",
        "apart",
    )
    rows = [
        (
            r.model, str(r.queries), str(r.context), _ms(r.ours_s), f"{r.flop / r.ours_s / 1e12:.1f}", _ms(r.torch_s),
            _ms(r.gather_s), f"{r.torch_over_ours:.2f}", f"{r.apart:.1e}",
        )
        for r in report.attention
    ]  # fmt: skip
    return table("Prefill attention of a layer, beside torch's flash attention", head, rows)


def _linear(report: Report) -> list[str]:
    head = ("model", "matrix", "rows", "int8 ms", "bfloat16 ms", "int8 / bfloat16", "floor ms", "int8 / floor")
    rows = [
        (
            r.model, f"{r.what} {r.outs} x {r.ins}", str(r.rows), _ms(r.int8_s), _ms(r.bfloat16_s),
            f"{r.int8_over_bfloat16:.2f}", _ms(max(r.floor_s, r.flop_floor_s)), f"{r.over_floor:.2f}",
        )
        for r in report.linear
    ]  # fmt: skip
    return table("Products with 8-bit weights, beside bfloat16", head, rows)


def _draws(report: Report) -> list[str]:
    rows = [(r.kind, str(r.rows), str(r.vocab), _ms(r.seconds)) for r in report.draws]
    return table("Drawing tokens", ("kind", "rows", "vocab", "ms"), rows)


def _load(report: Report) -> list[str]:
    rows = [
        (
            r.model,
            f"{r.num_bytes / 1e9:.2f}",
            f"{r.seconds:.2f}",
            f"{r.num_bytes / r.seconds / 1e9:.1f}",
            f"{r.eight_billion_s:.1f}",
        )
        for r in report.load
    ]
    return table("Weights to the device", ("model", "GB", "s", "GB/s", "16 GB would take s"), rows)


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
