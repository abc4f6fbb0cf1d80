"""The TCP socket beside each UCX connection: carries the handshake, then only shows whether the peer lives.

UCX by itself notices a peer killed behind shared memory after twenty seconds or never; the kernel closes a dead
process's socket at once. Frames are a 4-byte length and the bytes; the cap bounds what a stranger can make us buffer.
"""

from __future__ import annotations

import errno
import os
import socket

MAX_FRAME_BYTES = 128 << 10
_LENGTH_BYTES = 4


class HelloSocket:
    """Non-blocking. `lost` says why it is over."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self.lost: str | None = None

    @classmethod
    def connect(cls, host: str, port: int) -> HelloSocket:
        """Begin to connect; a failure shows as `lost`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        hello = cls(socket.socket(family, socket.SOCK_STREAM))
        try:
            hello._sock.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            hello.lost = f"cannot connect to {host}:{port}: {error}"
        return hello

    def fileno(self) -> int:
        return self._sock.fileno()

    def tune(self) -> None:
        """Small frames go at once; a peer whose host vanished is noticed in about ten seconds."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
            self._sock.setsockopt(socket.IPPROTO_TCP, option, value)

    @property
    def wants_write(self) -> bool:
        return bool(self._outgoing) and self.lost is None

    def send(self, data: bytes) -> None:
        if self.lost is None:
            self._outgoing += len(data).to_bytes(_LENGTH_BYTES, "big") + data
            self.flush()

    def flush(self) -> None:
        """Write what the kernel takes."""
        while self._outgoing and self.lost is None:
            try:
                del self._outgoing[: self._sock.send(self._outgoing)]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOTCONN:  # still connecting
                    self._check_connecting()
                    return
                self.lost = os.strerror(error.errno or 0)

    def receive(self) -> bytes | None:
        """The next whole frame, or None."""
        while self.lost is None:
            if (frame := self._take_frame()) is not None:
                return frame
            try:
                data = self._sock.recv(64 << 10)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    self._check_connecting()
                    return None
                self.lost = os.strerror(error.errno or 0)
                return None
            if not data:
                self.lost = "closed by the peer"
            self._incoming += data
        return self._take_frame()

    def hung_up(self) -> str | None:
        """Asks the kernel now; nothing is expected from the peer any more, so a frame here is its last word."""
        while (frame := self.receive()) is not None:
            self.lost = f"unexpected frame of {len(frame)} bytes beside the open connection"
        return self.lost

    def close(self) -> None:
        self.lost = self.lost or "closed here"
        self._sock.close()

    def _take_frame(self) -> bytes | None:
        if len(self._incoming) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._incoming[:_LENGTH_BYTES], "big")
        if length > MAX_FRAME_BYTES:
            self.lost = f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}"
            return None
        end = _LENGTH_BYTES + length
        if len(self._incoming) < end:
            return None
        frame = bytes(self._incoming[_LENGTH_BYTES:end])
        del self._incoming[:end]
        return frame

    def _check_connecting(self) -> None:
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.lost = os.strerror(error)
