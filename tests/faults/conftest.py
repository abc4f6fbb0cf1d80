"""The fault matrix's table: printed at the end of a run, and written to $KVBATON_FAULT_MATRIX where that is set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.fault_table import Finding, table

HEADER = """# Fault matrix

A request in each state (rows) meets each fault (columns), on real processes and real UCX; `make chaos` plays all of it
and writes this page. "same tokens": the stream went on and ended with the tokens of the fault-free run; the time is
from the fault to its next token. "released": nobody listens any more; the time is until no engine held anything.
Frozen processes are thawed after 5 s. After each cell no block was held and the pair served a probe as a pair again.
"""
FINDINGS = pytest.StashKey[list[Finding]]()


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> list[Finding]:
    """Where the cells of the matrix leave what they found."""
    return request.config.stash.setdefault(FINDINGS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(FINDINGS, [])
    if not found:
        return
    terminalreporter.section("fault matrix: outcome and time to recover")
    terminalreporter.write_line(table(found))
    if path := os.environ.get("KVBATON_FAULT_MATRIX"):
        Path(path).write_text(f"{HEADER}\n{table(found)}\n")
