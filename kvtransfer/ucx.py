"""The real transport: UCX through ucxx's low-level layer, driven by the agent's thread.

Peers meet on a TCP listener (loopback unless told otherwise) whose socket carries the handshake; UCX endpoints are
made from worker addresses that the handshake has authenticated, so a stranger's bytes never reach UCX's parsers
through us. When nothing moves, every worker is armed and the thread sleeps in one epoll over workers, sockets,
listener and wake-up.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterable, Mapping

from kvbaton.kvtransfer.hello_socket import HelloSocket
from kvbaton.kvtransfer.transport import BlockMemory, Channel, TransportError
from kvbaton.kvtransfer.ucx_channel import UcxChannel
from kvbaton.kvtransfer.ucx_library import BlockArrays, load_ucxx, ucx_config

_BACKLOG = 128
_SOCKET_INTERVAL = 16  # calls of progress between two looks at the sockets
_MAX_FRAME_BYTES = 2 << 20


class UcxTransport:
    """`cuda_device` is the GPU that holds `memory`, None for host memory. `config`: UCX settings, no prefix."""

    def __init__(
        self,
        memory: BlockMemory,
        host: str = "127.0.0.1",
        port: int = 0,
        cuda_device: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self._lib = load_ucxx()
        self._memory = memory
        self._cuda_device = cuda_device
        self._config = dict(config or {})
        self._context: object = None
        self._arrays: BlockArrays | None = None
        self._channels: list[UcxChannel] = []
        self._accepted: deque[UcxChannel] = deque()
        self._listener = _listen(host, port)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._calls = -1
        self._closed = False

    def open(self) -> None:
        if self._cuda_device is not None:
            import torch

            torch.cuda.set_device(self._cuda_device)
            torch.cuda.synchronize()  # makes its context current here: without one UCX drops CUDA IPC in silence
        features = (self._lib.Feature.TAG, self._lib.Feature.WAKEUP)
        try:
            config = ucx_config(self.host, self._cuda_device is not None, self._config)
            self._context = self._lib.UCXContext(config, feature_flags=features)
        except self._lib.UCXError as error:
            raise TransportError(f"UCX cannot start: {error}") from error
        self._arrays = BlockArrays(self._memory)

    def connect(self, host: str, port: int) -> Channel:
        return self._add(HelloSocket.connect(host, port))

    def accept(self) -> Channel | None:
        return self._accepted.popleft() if self._accepted else None

    def progress(self) -> Iterable[Channel]:
        for channel in self._channels:
            if channel.established and not channel.closed:
                channel.progress()
        self._calls += 1
        if self._calls % _SOCKET_INTERVAL == 0:
            self._progress_sockets()
        return tuple(self._channels)

    def wait(self, timeout_s: float) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.register(self._listener, select.POLLIN)
        for channel in self._channels:
            if channel.closed:
                continue
            if channel.established:
                if not channel.arm():
                    return
                poller.register(channel.event_fd, select.POLLIN)
            if channel.hello.lost is None:
                poller.register(
                    channel.hello.fileno(), select.POLLIN | (select.POLLOUT if channel.hello.wants_write else 0)
                )
        poller.poll(timeout_s * 1000)
        self._calls = -1  # a socket may have ended the wait: look at them at once
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self._context = None
        self._listener.close()

    def _progress_sockets(self) -> None:
        """Handshakes, hang-ups, new connections: rare, so not worth system calls in every round of a transfer."""
        self._channels = [c for c in self._channels if not c.closed]
        for channel in self._channels:
            if channel.established:
                channel.probe()
            else:
                channel.hello.flush()
        self._take_connections()

    def _take_connections(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._accepted.append(self._add(HelloSocket(sock)))

    def _add(self, hello: HelloSocket) -> UcxChannel:
        if self._context is None or self._arrays is None:
            raise TransportError("the transport is not open")
        if hello.lost is None:
            hello.tune()
        channel = UcxChannel(self._lib, self._context, hello, self._arrays, _MAX_FRAME_BYTES)
        self._channels.append(channel)
        return channel


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener
