"""ruff and mypy as tests, so that `make test` and `.ci/run` are one and the same thing, and who else runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def lint_commands() -> list[str]:
    """What `make lint` runs, in its order, without the folder of the tools: "ruff check ."."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe
    return [line.strip().removeprefix("@").removeprefix("$(BIN)/") for line in recipe[1].splitlines()]


def run_tool(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | variables,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("command", lint_commands())
def test_static_check(command: str) -> None:
    """Guards style, format and types (mypy --strict on the whole package)."""
    pytest.importorskip(command.split()[0])
    result = run_tool(*command.split())
    assert result.returncode == 0, result.stdout + result.stderr


def test_hooks_run_what_make_lint_runs() -> None:
    """Guards against a commit that the hooks let through and `make lint` refuses, by other arguments or versions."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [f".venv/bin/{command}" for command in lint_commands()]
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}


def test_make_help_lists_every_target() -> None:
    """Guards against a target that nobody finds, and a line about one that is gone."""
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert targets
    assert sorted(re.findall(r"^#   make (\S+)  ", MAKEFILE, re.MULTILINE)) == sorted(targets[1].split())


@pytest.mark.process
def test_benchmarks_call_what_there_is() -> None:
    """Guards benchmarks, which no test runs whole, against functions that have changed under them."""
    pytest.importorskip("mypy")
    programs = [str(path) for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    result = run_tool("mypy", *programs, MYPYPATH="src:benchmarks:tests")
    assert "checked" in result.stdout, result.stdout + result.stderr
    wrong = [line for line in result.stdout.splitlines() if line.endswith(("[call-arg]", "[name-defined]"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.process
def test_the_banned_api_rule_bites(tmp_path: Path) -> None:
    """Guards the configuration of ruff itself: a bare `import kernels` must be refused under our pyproject."""
    pytest.importorskip("ruff")
    source = tmp_path / "wrong.py"
    source.write_text("from kernels import reference\n\nprint(reference)\n")
    result = run_tool("ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(source))
    assert result.returncode == 1
    assert "TID251" in result.stdout
    assert "import kvbaton.kernels" in result.stdout
