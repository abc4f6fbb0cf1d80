"""The guard that keeps the fast set honest: `support/fast_set.py` on tests that break its rule in each way there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
RULE_BREAKERS = """
import asyncio, contextlib, multiprocessing, os, subprocess, sys

import pytest

@pytest.fixture
def server():
    return subprocess.run(["true"])

def test_clean(): ...

def test_run(): subprocess.run(["true"])

def test_swallowed():
    with contextlib.suppress(Exception):
        subprocess.check_output(["true"])

async def test_asyncio(): await asyncio.create_subprocess_exec("true")

def test_fork(): multiprocessing.get_context("fork").Process(target=print).start()

def test_spawn(): multiprocessing.get_context("spawn").Process(target=print).start()

def test_shell(): os.system("true")

def test_cluster():
    import ray
    ray.init(address="local")

def test_fixture(server): ...

@pytest.mark.process
def test_marked(): assert subprocess.run(["true"]).returncode == 0

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.slow
def test_slow_is_no_leave(): subprocess.run(["true"])
"""
REFUSED = {"run", "swallowed", "asyncio", "fork", "spawn", "shell", "cluster", "fixture"}


def outcomes(folder: Path, *options: str) -> dict[str, set[str]]:
    """outcome -> the tests that had it, of pytest run over the rule breakers under this repository's settings."""
    (folder / "test_breakers.py").write_text(RULE_BREAKERS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-rA"]
    command += ["-o", f"pythonpath={ROOT / 'tests'}", "-p", "support.fast_set", *options, str(folder)]
    ran = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=120)
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\w+)", ran.stdout, re.MULTILINE):
        found.setdefault(outcome, set()).add(name)
    return found


def test_a_test_without_a_mark_may_not_start_a_process(tmp_path: Path) -> None:
    """In a run of everything, as continuous integration has it. A fixture that is refused fails in setup."""
    found = outcomes(tmp_path)
    assert found["PASSED"] == {"clean", "marked", "slow"}
    assert found["FAILED"] | found["ERROR"] == REFUSED | {"slow_is_no_leave"}
    assert found["ERROR"] == {"fixture"}


def test_a_fast_run_leaves_out_what_is_marked(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "--fast")
    assert found["PASSED"] == {"clean"}
    assert found["FAILED"] | found["ERROR"] == REFUSED
