"""HAProxy under guard: its side doors on loopback, and gone when its parent is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from kvbaton.cluster import haproxy_guard
from kvbaton.cluster.haproxy_guard import bind_to_loopback

CONFIG = """
defaults
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
listen stats
  bind *:8404
frontend grpc
    bind 10.0.0.1:9000 proto h2
"""


def test_side_doors_move_to_loopback_and_the_public_one_stays() -> None:
    moved = bind_to_loopback(CONFIG, keep="8000")
    assert "bind 127.0.0.1:9101" in moved
    assert "bind 127.0.0.1:8404" in moved
    assert "bind *:8000" in moved
    assert "bind 10.0.0.1:9000 proto h2" in moved


def test_the_command_dies_with_its_parent(tmp_path: Path) -> None:
    """Guards against an HAProxy that holds the port after its actor was killed: the next launch could not start."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    stand_in = tmp_path / "haproxy"
    stand_in.write_text('#!/bin/sh\necho "$$ $@"\nexec sleep 600\n')
    stand_in.chmod(0o700)
    guard = Path(haproxy_guard.__file__)
    command = [sys.executable, "-I", str(guard), "8000", str(stand_in), "-db", "-f", str(config)]
    code = f"import subprocess; subprocess.run({command!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, *arguments = parent.stdout.readline().split()
    assert arguments == ["-db", "-f", str(config)]
    assert config.read_text() == bind_to_loopback(CONFIG.replace("    option splice-request\n", ""), keep="8000")
    child = psutil.Process(int(pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
    parent.stdout.close()
