"""One end of a session's TCP connection: frames in, frames out, a cap on what waits, and beats against silence.

Both ends use it; what a frame means is the owner's business. A connection ends once, in `closed` with the first reason.
The event loop holds the transport and the transport holds this object, so nothing here can be collected while open.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol, cast

from kvbaton.cluster.session.messages import MAX_HANDSHAKE_BYTES
from kvbaton.cluster.session.wire import FrameReader
from kvbaton.kvtransfer.codec import WireError
from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.settings import Count, Seconds, check


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Caps and times of a session. A peer that stays silent for `silence_s`, beats included, counts as gone."""

    max_frame_bytes: Count = 64 << 20
    max_buffered_bytes: Count = 16 << 20
    max_sessions: Count = 256
    handshake_s: Seconds = 5.0
    beat_s: Seconds = 1.0
    silence_s: Seconds = 10.0

    def __post_init__(self) -> None:
        check(self)


class ConnectionOwner(Protocol):
    """What a connection tells the one who opened it, on the event loop."""

    def opened(self) -> None: ...

    def frame(self, frame: bytes) -> None:
        """One whole frame. May raise `WireError` or `HandshakeRefused`: the connection is dropped for that reason."""
        ...

    def beat(self) -> None:
        """Time to send something, so that the peer knows this end lives."""
        ...

    def closed(self, reason: str) -> None: ...


class FramedConnection(asyncio.Protocol):
    """Bytes to frames and back. Until `authenticated` only short frames and `handshake_s` are allowed."""

    def __init__(self, owner: ConnectionOwner, limits: SessionLimits) -> None:
        self._owner = owner
        self._limits = limits
        self._reader = FrameReader(min(MAX_HANDSHAKE_BYTES, limits.max_frame_bytes))
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reason = ""
        self._heard_at = 0.0
        self.finished = asyncio.get_running_loop().create_future()  # None, once the socket is closed
        self.remote = ""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._reason

    def authenticated(self) -> None:
        """The peer has proved itself: long frames are welcome from here on, and beats start."""
        self._reader.max_frame_bytes = self._limits.max_frame_bytes
        self._schedule_beat()

    def send(self, frame: bytes) -> None:
        """Queue a frame. A peer that lets more than `max_buffered_bytes` wait is dropped instead; never blocks."""
        if self._transport is None or self._reason:
            return
        waiting = self._transport.get_write_buffer_size()
        if waiting > self._limits.max_buffered_bytes:
            self.drop(f"{waiting} bytes wait for a slow reader, {self._limits.max_buffered_bytes} allowed")
            return
        self._transport.write(frame)

    def close(self, reason: str) -> None:
        """End after everything queued has been sent."""
        if self.open and self._transport is not None:
            self._reason = reason
            self._transport.close()

    def drop(self, reason: str) -> None:
        """End now; what was queued is lost. Also cuts a `close` short."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods and is no subclass
        self.remote = "{}:{}".format(*transport.get_extra_info("peername", ("?", 0))[:2])
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        self._timer = loop.call_later(self._limits.handshake_s, self.drop, "the handshake took too long")
        self._owner.opened()

    def data_received(self, data: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        try:
            for frame in self._reader.feed(data):
                if self._reason:
                    return
                self._owner.frame(frame)
        except (WireError, HandshakeRefused) as error:
            # `close` and not `drop`: the owner may have queued the reason for the peer.
            self.close(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._reason = self._reason or (f"connection lost: {error}" if error else "closed by the peer")
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if not self.finished.done():
            self.finished.set_result(None)
        self._owner.closed(self._reason)

    def _schedule_beat(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._limits.beat_s, self._beat)

    def _beat(self) -> None:
        silent_s = asyncio.get_running_loop().time() - self._heard_at
        if silent_s > self._limits.silence_s:
            self.drop(f"silent for {silent_s:.1f} s")
            return
        self._owner.beat()
        self._schedule_beat()
