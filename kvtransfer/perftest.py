"""Runs UCX's own `ucx_perftest tag_bw` between two processes of this host: the yardstick for block transfer."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path


class PerftestError(Exception):
    """ucx_perftest is missing or did not finish; the text holds its last words."""


def find_perftest() -> Path:
    """The binary that comes with the libucx wheel."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "bin" / "ucx_perftest"
        if binary.exists():
            return binary
    raise PerftestError("ucx_perftest not found: it comes with the libucx-cu13 package")


def tag_bandwidth(size_bytes: int, messages: int, env: Mapping[str, str], timeout_s: float = 60.0) -> float:
    """Overall bandwidth in bytes per second for `messages` messages of `size_bytes`.

    A first failure is tried again: the free port may have been taken in between, and perftest does not report its own.
    """
    try:
        return _tag_bandwidth(size_bytes, messages, env, timeout_s)
    except PerftestError:
        return _tag_bandwidth(size_bytes, messages, env, timeout_s)


def _tag_bandwidth(size_bytes: int, messages: int, env: Mapping[str, str], timeout_s: float) -> float:
    binary = find_perftest()
    port = str(_free_port())
    full_env = {**os.environ, **env, "LD_LIBRARY_PATH": str(binary.parent.parent / "lib")}
    server = subprocess.Popen([binary, "-p", port], env=full_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_listener(port, server, timeout_s)
        arguments = ["-p", port, "127.0.0.1", "-t", "tag_bw", "-s", str(size_bytes), "-n", str(messages)]
        done = subprocess.run(
            [binary, *arguments, "-w", "20", "-f"],
            env=full_env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    finally:
        server.kill()
        server.wait()
    return overall_bandwidth(done.stdout, done.stderr)


def overall_bandwidth(stdout: str, stderr: str) -> float:
    """In bytes per second, from what perftest printed. Raises PerftestError where it printed no result.

    The last line's columns are iterations, percentile, 2 x overhead, average and overall MB/s, 2 x message rate.
    """
    lines = [line.split() for line in stdout.splitlines() if line.strip()]
    if not lines or len(lines[-1]) < 6:
        raise PerftestError(f"ucx_perftest gave no result: {(stdout + stderr)[-500:]}")
    return float(lines[-1][-3]) * 1e6


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_for_listener(port: str, server: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Until /proc shows the port in LISTEN: a trial connection would be taken for the client."""
    wanted = f":{int(port):04X}"
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.poll() is not None:
            raise PerftestError(f"ucx_perftest server ended with {server.returncode}")
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            if any(row[1].endswith(wanted) and row[3] == "0A" for row in rows):
                return
        time.sleep(0.02)
    raise PerftestError("ucx_perftest server does not listen")
