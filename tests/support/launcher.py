"""A `kvbaton serve` in a process of its own, as a user starts it, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

READY_LINE = "Ctrl-C stops everything."
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


class Launcher:
    """Starts at once; `wait_ready` returns when the endpoint is up."""

    def __init__(self, model: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "kvbaton.cluster.cli", "serve", "--model", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # as a terminal does: signals of the tests' own group do not reach it
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self.base_url = ""
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip())
        self._queue.put(None)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_line(self, text: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line that contains `text`; fails with all output when it does not come."""
        while True:
            try:
                line = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError(f"no line with {text!r} after {timeout_s:g} s:\n{self.output}") from None
            if line is None:
                raise AssertionError(f"ended before a line with {text!r}:\n{self.output}")
            self.lines.append(line)
            if text in line:
                return line

    def wait_ready(self) -> Launcher:
        self.base_url = self.wait_line("✓ endpoint").split()[2]
        self.wait_line(READY_LINE)
        return self

    def family(self) -> list[psutil.Process]:
        """The launcher and everything that it started, at this moment."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def child(self, name: str) -> psutil.Process:
        """The one descendant whose command line contains `name`."""
        (found,) = [process for process in self.family() if name in command_of(process)]
        return found

    def has_child(self, name: str) -> bool:
        return any(name in command_of(process) for process in self.family())

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal, wait for the end; returns the exit status and keeps the last lines."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self._ended()

    def press_ctrl_c(self) -> int:
        """What a terminal does: SIGINT to every process of the foreground group, Ray's included."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self._ended()

    def _ended(self) -> int:
        status = self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(queue.Empty):
            while (line := self._queue.get(timeout=5)) is not None:
                self.lines.append(line)
        return status

    def close(self) -> None:
        """End by force whatever is left, so that a failed test leaves nothing running."""
        if self.process.poll() is None:
            for process in reversed(self.family()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(10)


def command_of(process: psutil.Process) -> str:
    """Empty for one that is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def survivors(processes: list[psutil.Process], timeout_s: float) -> list[str]:
    """Command lines of those that are still there after `timeout_s`."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [command_of(process) for process in alive if process.is_running() and command_of(process)]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true in time; for what another process does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
