"""The end of a launch that could not end itself: `python reaper.py MARKER FOLDER`, reading a pipe from the launcher.

When the pipe closes, because the launcher has ended in whatever way, every process that carries MARKER in its
environment, or has a file below FOLDER open, is killed, and FOLDER is removed. Ray's processes mostly die with their
driver by themselves; its agents wait for a server that is gone, for a minute and longer. Standard library only: it
starts in isolated mode.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

MARKER_VARIABLE = "KVBATON_LAUNCH"
_ROUNDS = 50
_PAUSE_S = 0.1


class Reaper:
    """The launcher's end of it: what starts inside the `with` block, in this environment, does not outlive it."""

    def __init__(self, marker: str, folder: Path) -> None:
        self._command = [sys.executable, "-I", str(Path(__file__).resolve()), marker, str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Reaper:
        environment = {name: value for name, value in os.environ.items() if name != MARKER_VARIABLE}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, start_new_session=True, env=environment, cwd="/"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Returns when nothing that carries the marker is left."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def processes_of(marker: str, folder: str) -> list[int]:
    """Processes of this user that belong to the launch, but for the caller and its parent: the launcher itself.

    Ray's agents write their title over a part of their environment, and the marker may have been there; but they keep
    their logs open.
    """
    wanted, inside = f"{MARKER_VARIABLE}={marker}".encode(), f"{folder}/"
    spared = (os.getpid(), os.getppid())
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in spared]
    return [pid for pid in pids if wanted in _environment(pid) or _any_inside(pid, inside)]


def _any_inside(pid: int, folder: str) -> bool:
    return any(path.startswith(folder) for path in _open_files(pid))


def _environment(pid: int) -> list[bytes]:
    """Empty for a process that has gone or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _open_files(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def reap(marker: str, folder: str) -> None:
    """Kill until none is left: the last round may have started another."""
    for _ in range(_ROUNDS):
        processes = processes_of(marker, folder)
        if not processes:
            return
        for pid in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def main(argv: list[str]) -> None:
    marker, folder = argv
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    reap(marker, folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
