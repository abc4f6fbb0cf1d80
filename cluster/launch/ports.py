"""The TCP ports of a launch: whether one is free, who has it, and claims among the launches of one machine.

Between the moment a launch chooses a port and the moment somebody listens on it, half a minute goes by. Another launch
that chose the same port meanwhile would fail late or, as HAProxy sets SO_REUSEPORT, share it. So a launch claims its
ports. A claim is a Unix socket with a name and no file: the kernel drops it with its process, and keeps one set of
names for each network namespace, as it does with ports.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Container

import psutil

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.settings import ConfigError

# Below the kernel's ephemeral range, and outside those that Ray takes its own from: nobody is handed one by chance.
_PORTS = range(20000, 30000)
_PEER = struct.Struct("3i")  # pid, uid, gid


class PortClaims:
    """Ports that no other launch of this machine may choose, until `close`, which may be called again."""

    def __init__(self, candidates: range = _PORTS) -> None:
        """`candidates` are the ports that `free` chooses from."""
        self._candidates = candidates
        self._sockets: list[socket.socket] = []

    def endpoint(self, http: HttpConfig) -> None:
        """Claim the port that the user wants. Raises `ConfigError`, naming the launch that has it."""
        if not self._claim(http.port):
            other = other_port(http)
            raise ConfigError(
                f"another launch{_holder(http.port)} is about to use port {http.port}; stop it, or choose another "
                f"port: --port {other} (make serve PORT={other})"
            )

    def free(self, count: int) -> list[int]:
        """Claim `count` distinct ports on which nobody listens at this moment. Raises `ConfigError`."""
        found: list[int] = []
        for port in random.SystemRandom().sample(self._candidates, len(self._candidates)):
            if len(found) == count:
                break
            if _can_listen("", port) and self._claim(port):
                found.append(port)
        if len(found) < count:
            raise ConfigError(f"no {count} free TCP ports from {self._candidates[0]} to {self._candidates[-1]}")
        return found

    def close(self) -> None:
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def _claim(self, port: int) -> bool:
        """False where another launch has it, or this one."""
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(_claim_name(port))
        except OSError as error:
            held.close()
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        held.listen()
        self._sockets.append(held)
        return True


def _claim_name(port: int) -> str:
    return f"\0kvbaton-port-{port}"


def _holder(port: int) -> str:
    """The process id of a claim's owner, in brackets; nothing where it has just let go."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(_claim_name(port))
        except OSError:
            return ""
        pid, _, _ = _PEER.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return f" (pid {pid})"


def check_port(http: HttpConfig, ours: Container[int | None] = ()) -> None:
    """Raise `ConfigError` when the endpoint's port cannot be opened, naming who has it; processes in `ours` may."""
    try:
        family = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise ConfigError(f"http.host: '{http.host}' is not an address of this machine: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except PermissionError:
            raise ConfigError(f"port {http.port} needs more rights than this user has; choose one above 1023") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {http.host}:{http.port}: {error.strerror}") from None
            pid = _listening(http.port)
            if pid in ours:
                return
            who, other = _name(pid), other_port(http)
            raise ConfigError(
                f"port {http.port} on {http.host} is in use by {who}; stop it, or choose another: --port {other} "
                f"(make serve PORT={other})"
            ) from None


def other_port(http: HttpConfig) -> int:
    """A port near the wanted one that is free at this moment; 0, which asks for any, where there is none."""
    nearby = range(http.port + 1, min(http.port + 50, 65536))
    return next((port for port in nearby if _can_listen(http.host, port)), 0)


def _can_listen(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _listening(port: int) -> int | None:
    """The process that listens on a port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection.pid
    return None


def _name(pid: int | None) -> str:
    if pid is None:
        return "another process"
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"
