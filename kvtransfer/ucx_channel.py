"""One UCX connection: a worker of its own, an endpoint to the peer's worker, and the hello socket beside them.

Each connection has its own UCX worker, for the sake of ownership. Tags, posted receives and half-received messages
belong to a worker, and UCX cannot take back a receive that has begun; but a destroyed worker has no transport left
through which anything could be read or written. So `close` destroys the worker, in every state, dead peer or living,
and after it returns no block of this connection can be touched. (Closing the endpoint first is not needed, and ucxx
crashes when asked to close one whose TCP peer has died.) It also keeps peers apart: what one sends unasked fills its
own worker's queue only.

Control frames are tag messages with CONTROL_TAG; blocks carry the tags of their grants. A message that no posted
receive takes and that is not control breaks the protocol: correct senders only ever send what was granted.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from kvbaton.kvtransfer.hello_socket import HelloSocket
from kvbaton.kvtransfer.transport import Operation, TransportError
from kvbaton.kvtransfer.ucx_library import BlockArrays, array_of, endpoint_transports

CONTROL_TAG = 1


class NeverCompletes:
    """An operation asked of a connection that is lost already: it ends when the channel closes."""

    completed = False


class UcxChannel:
    """Implements Channel. `libucxx` is ucxx's low-level module."""

    def __init__(
        self, libucxx: Any, context: Any, hello: HelloSocket, arrays: BlockArrays, max_frame_bytes: int
    ) -> None:
        self.hello = hello
        self.closed = False
        self._lib = libucxx
        self._arrays = arrays
        self._max_frame_bytes = max_frame_bytes
        self._lost: str | None = None
        self._endpoint: Any = None
        self._transports = ""
        self._control_in: deque[tuple[Any, bytearray]] = deque()
        self._control_out: deque[tuple[Any, Any]] = deque()
        self._context = context
        self._worker: Any = None
        self._control_tag = libucxx.UCXXTag(CONTROL_TAG)
        self._any_tag = libucxx.UCXXTag(0)
        self._any_mask = libucxx.UCXXTagMask(0)

    def local_blob(self) -> bytes:
        """Makes the worker: not before the handshake wants it, so a stranger's connection costs a socket."""
        if self._worker is None:
            try:
                self._worker = self._lib.UCXWorker(
                    self._context, enable_delayed_submission=False, enable_python_future=False
                )
                self._worker.init_blocking_progress_mode()
            except self._lib.UCXError as error:
                raise TransportError(f"UCX worker: {error}") from error
        return bytes(self._lib.UCXAddress.create_from_worker(self._worker).tobytes())

    def establish(self, peer_blob: bytes) -> None:
        try:
            address = self._lib.UCXAddress.create_from_buffer(peer_blob)
            self._endpoint = self._lib.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except self._lib.UCXError as error:
            raise TransportError(f"UCX cannot reach the peer: {error}") from error
        self._transports = endpoint_transports(self._endpoint.handle)

    # frames

    def send(self, data: bytes) -> None:
        if self._endpoint is None:
            self.hello.send(data)
            return
        if self._endpoint.alive:
            array = array_of(data)
            self._control_out.append((self._endpoint.tag_send(array, self._control_tag), array))

    def receive(self) -> bytes | bytearray | None:
        if self._endpoint is None:
            return self.hello.receive()
        self._probe()
        if self._control_in and self._control_in[0][0].completed:
            request, buffer = self._control_in.popleft()
            if (failure := self.failure(request)) is None:
                return buffer
            self._lose(f"control frame: {failure}")
        return None

    # blocks

    def post_receive(self, tag: int, block_id: int) -> Operation:
        request: Operation = self._worker.tag_recv(self._arrays.of(block_id), self._lib.UCXXTag(tag))
        return request

    def post_send(self, tag: int, block_id: int) -> Operation:
        return self._send_array(tag, self._arrays.of(block_id))

    def post_abort(self, tag: int) -> Operation:
        return self._send_array(tag, self._arrays.empty)

    def failure(self, operation: Operation) -> str | None:
        if not isinstance(operation, self._lib.UCXRequest):
            return None
        try:
            operation.check_error()
        except self._lib.UCXError as error:
            return str(error)
        return None

    # life

    def lost(self) -> str | None:
        if self._lost is None:
            if self._endpoint is None:
                self._lost = self.hello.lost
            elif not self._endpoint.alive:
                self._lost = "UCX endpoint failed"
        return self._lost

    def probe(self) -> str | None:
        if self._lost is None and self._endpoint is not None:
            self._lost = self.hello.hung_up()
        return self.lost()

    def describe(self) -> str:
        return self._transports

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._lost = self._lost or "closed here"
        self._control_in.clear()
        self._control_out.clear()
        self._endpoint = None
        self._worker = None
        self.hello.close()

    # for UcxTransport

    @property
    def established(self) -> bool:
        return self._endpoint is not None

    @property
    def event_fd(self) -> int:
        """Readable when an armed worker has an event."""
        fd: int = self._worker.epoll_file_descriptor
        return fd

    def progress(self) -> None:
        self._worker.progress()
        while self._control_out and self._control_out[0][0].completed:
            request, _ = self._control_out.popleft()
            if (failure := self.failure(request)) is not None:
                self._lose(f"control frame: {failure}")

    def arm(self) -> bool:
        """True if the worker has nothing to do and will signal its event_fd when it has."""
        armed: bool = self._worker.arm()
        return armed

    def _send_array(self, tag: int, array: Any) -> Operation:
        if self._endpoint is None or not self._endpoint.alive:
            return NeverCompletes()
        request: Operation = self._endpoint.tag_send(array, self._lib.UCXXTag(tag))
        return request

    def _probe(self) -> None:
        """Start to receive a control frame that has arrived; anything else unasked for ends the connection."""
        found = self._worker.tag_probe(self._any_tag, self._any_mask, remove=True)
        if not found.matched:
            return
        is_control = found.sender_tag.value == CONTROL_TAG
        if not is_control or found.length > self._max_frame_bytes:
            what = (
                f"control frame of {found.length} bytes" if is_control else f"block message {found.sender_tag.value:#x}"
            )
            self._lose(f"unexpected {what}")
        buffer = bytearray(min(found.length, self._max_frame_bytes))
        request = self._worker.tag_recv_with_handle(array_of(buffer), found)
        if self._lost is None:
            self._control_in.append((request, buffer))

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason
