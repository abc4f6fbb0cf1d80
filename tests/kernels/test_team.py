"""The thread team of the native library, alone, under a race detector and under more threads than cores."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvbaton.kernels.native_build import SOURCES

pytestmark = pytest.mark.process

STRESS = Path(__file__).with_name("team_stress.c")


def compiled(folder: Path, *flags: str) -> Path:
    """The stress program; skips where it cannot be built with these flags."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = folder / "stress"
    sources = [str(STRESS), str(SOURCES / "team.c")]
    command = [compiler, "-std=gnu11", "-g", *flags, f"-I{SOURCES}", *sources, "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{' '.join(flags)}: {built.stderr.strip()[-200:]}")
    return program


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_phases_see_all_that_earlier_phases_wrote(tmp_path: Path, threads: int) -> None:
    """Guards against a member that goes on before the last item is done, and against one that comes late into the next
    run: either gives wrong numbers or hangs."""
    program = compiled(tmp_path, "-O3")
    ran = subprocess.run([program, str(threads), "3000"], capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.returncode) == ("equal\n", 0)


@pytest.mark.parametrize("threads", [2, 4])
def test_no_data_race(tmp_path: Path, threads: int) -> None:
    """The race detector sees accesses that no release and acquire orders, also where x86 would forgive them."""
    program = compiled(tmp_path, "-O2", "-fsanitize=thread")
    ran = subprocess.run([program, str(threads), "500"], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("the race detector does not run under this kernel's address layout")
    assert (ran.stdout, ran.stderr, ran.returncode) == ("equal\n", "", 0)
