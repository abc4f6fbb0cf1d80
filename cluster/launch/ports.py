"""One launch at a time starts on a port: between the check that it is free and the moment somebody listens, half a
minute goes by, and another launch that began meanwhile would fail late or, as HAProxy sets SO_REUSEPORT, share it.

The claim is a Unix socket with a name and no file: the kernel drops it with its process, and keeps one set of names for
each network namespace, as it does with ports.
"""

from __future__ import annotations

import errno
import socket
import struct

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.launch.preflight import other_port
from kvbaton.engine.config import ConfigError

_PEER = struct.Struct("3i")  # pid, uid, gid


class PortClaim:
    """Held from here until `close`, which may be called again. Raises `ConfigError`, naming the launch that has it."""

    def __init__(self, http: HttpConfig) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        name = f"\0kvbaton-starts-on-{http.port}"
        try:
            self._socket.bind(name)
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise
            other = other_port(http)
            raise ConfigError(
                f"another launch{_holder(name)} is starting on port {http.port}; stop it, or choose another port: "
                f"--port {other} (make serve PORT={other})"
            ) from None
        self._socket.listen()

    def close(self) -> None:
        self._socket.close()


def _holder(name: str) -> str:
    """The process id in brackets; nothing where it has just let go."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(name)
        except OSError:
            return ""
        pid, _, _ = _PEER.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return f" (pid {pid})"
