"""Triton's kernels against the reference in Triton's interpreter: wrong indexing and masks show without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.triton_cases import CHECKS

pytest.importorskip("triton", reason="triton is not installed on this platform")

pytestmark = pytest.mark.process

NAMES = [check.name for check in CHECKS if check.interpreter]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """One process for all checks: Triton decides between compiler and interpreter when it is imported."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "support.triton_cases"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernels_match_the_reference(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
