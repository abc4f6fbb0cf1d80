"""What the fault matrix found: state x fault -> outcome and time to recover, as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`recovered_s`: until the stream's next token, or until nothing was held where nobody listens any more.
    `free_s`: from the last stream's end until no engine held a block."""

    state: str
    fault: str
    outcome: str
    recovered_s: float
    free_s: float


def table(findings: list[Finding]) -> str:
    """Markdown: a row a state, a column a fault."""
    states = list(dict.fromkeys(f.state for f in findings))
    faults = list(dict.fromkeys(f.fault for f in findings))
    by_cell = {(f.state, f.fault): f for f in findings}
    lines = ["| state | " + " | ".join(faults) + " |", "|---" * (1 + len(faults)) + "|"]
    for state in states:
        cells = [_cell(by_cell.get((state, fault))) for fault in faults]
        lines.append(f"| {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(finding: Finding | None) -> str:
    return "" if finding is None else f"{finding.outcome} {finding.recovered_s:.2f} s"
