"""The last guard against orphans: it must find what belongs to the launch, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvbaton.cluster.launch.reaper import MARKER_VARIABLE, Reaper, processes_of, reap

SLEEP = "import sys, time; print('up', flush=True); time.sleep(600)"
MARKER = "6f1c"


class Bystanders:
    """Processes that the tests start, ended when the test is over."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, code: str = SLEEP, **environment: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self._started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process.pid

    def alive(self, pid: int) -> bool:
        return next(item for item in self._started if item.pid == pid).poll() is None

    def wait(self, pid: int) -> int:
        return next(item for item in self._started if item.pid == pid).wait(10)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def bystanders() -> Iterator[Bystanders]:
    bystanders = Bystanders()
    yield bystanders
    bystanders.close()


@pytest.mark.process
def test_the_marker_and_open_files_tell_and_nothing_else_does(bystanders: Bystanders, tmp_path: Path) -> None:
    """Guards other people's processes: a marker that only begins alike, a folder that only begins alike."""
    holds = "f = open({path!r}, 'w'); " + SLEEP
    (tmp_path / "run").mkdir()
    (tmp_path / "runner").mkdir()
    marked = bystanders.start(**{MARKER_VARIABLE: MARKER})
    logging = bystanders.start(holds.format(path=str(tmp_path / "run" / "agent.log")))
    bystanders.start(**{MARKER_VARIABLE: MARKER + "0"})
    bystanders.start(holds.format(path=str(tmp_path / "runner" / "agent.log")))
    assert sorted(processes_of(MARKER, str(tmp_path / "run"))) == sorted([marked, logging])


@pytest.mark.process
def test_reaping_kills_those_and_only_those(bystanders: Bystanders, tmp_path: Path) -> None:
    marked, other = bystanders.start(**{MARKER_VARIABLE: MARKER}), bystanders.start()
    reap(MARKER, str(tmp_path / "run"))
    assert bystanders.wait(marked) == -9
    assert bystanders.alive(other)


@pytest.mark.process
def test_leaving_the_block_ends_everything_and_the_folder(bystanders: Bystanders, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    own = (folder / "own.log").open("w")  # by which the owner, this process, must not be taken for one of them
    with own, Reaper(MARKER, folder):
        marked = bystanders.start(**{MARKER_VARIABLE: MARKER})
        assert bystanders.alive(marked)
        assert folder.exists()
    assert bystanders.wait(marked) == -9
    assert not folder.exists()


@pytest.mark.process
def test_a_killed_owner_counts_as_leaving(bystanders: Bystanders, tmp_path: Path) -> None:
    """Guards `kill -9` of the launcher: the pipe closes with the process."""
    folder = tmp_path / "run"
    folder.mkdir()
    owner = bystanders.start(
        "from pathlib import Path; from kvbaton.cluster.launch.reaper import Reaper; import sys, time\n"
        f"with Reaper({MARKER!r}, Path({str(folder)!r})):\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    (watcher,) = psutil.Process(owner).children()
    marked = bystanders.start(**{MARKER_VARIABLE: MARKER})
    psutil.Process(owner).kill()
    assert bystanders.wait(marked) == -9
    psutil.wait_procs([watcher], timeout=10)
    assert not folder.exists()
