"""ruff and mypy as tests, so that `make test` and `.ci/run` are one and the same thing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent.parent


def run_tool(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | variables,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)])
def test_static_check(arguments: tuple[str, ...]) -> None:
    """Guards style, format and types (mypy --strict on the whole package)."""
    pytest.importorskip(arguments[0])
    result = run_tool(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_benchmarks_call_what_there_is() -> None:
    """Guards benchmarks, which no test runs whole, against functions that have changed under them."""
    pytest.importorskip("mypy")
    programs = [str(path) for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    result = run_tool("mypy", *programs, MYPYPATH="src:benchmarks:tests")
    assert "checked" in result.stdout, result.stdout + result.stderr
    wrong = [line for line in result.stdout.splitlines() if line.endswith(("[call-arg]", "[name-defined]"))]
    assert not wrong, "\n".join(wrong)


def test_the_banned_api_rule_bites(tmp_path: Path) -> None:
    """Guards the configuration of ruff itself: a bare `import kernels` must be refused under our pyproject."""
    pytest.importorskip("ruff")
    source = tmp_path / "wrong.py"
    source.write_text("from kernels import reference\n\nprint(reference)\n")
    result = run_tool("ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(source))
    assert result.returncode == 1
    assert "TID251" in result.stdout
    assert "import kvbaton.kernels" in result.stdout
