"""The ingress's end of the session plane: one connection to one engine incarnation.

A client is used once: `connect`, then submits and aborts, until `SessionEvents.lost` or `close`. To reconnect, make a
new one.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from kvbaton.cluster.session.connection import FramedConnection, SessionLimits
from kvbaton.cluster.session.handshake import IngressHandshake
from kvbaton.cluster.session.messages import AbortMessage, BeatMessage, StepMessage, SubmitMessage, ToIngress
from kvbaton.cluster.session.wire import Encoder, decode_message
from kvbaton.engine.orders import Migrate, Notice, Submit
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad


class SessionLost(ConnectionError):
    """The engine cannot be reached, refused the handshake, or went away; the message says which and why."""


class SessionEvents(Protocol):
    """What a session tells its owner, on the event loop."""

    def step(self, client: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        """One engine step: every token for this ingress (maybe none) and the engine's load."""
        ...

    def notice(self, client: SessionClient, notice: Notice) -> None:
        """Something about a migration; the tokens that the engine made before have been told."""
        ...

    def lost(self, client: SessionClient, reason: str) -> None:
        """The session is over; called once, after a successful `connect`, also when it ends by `close`."""
        ...


class SessionClient:
    """Connection to the engine `info`, authenticated with the cluster secret."""

    def __init__(
        self,
        info: EngineInfo,
        secret: bytes,
        ingress_id: str,
        events: SessionEvents,
        limits: SessionLimits | None = None,
    ) -> None:
        self.info = info
        self._events = events
        self._limits = limits or SessionLimits()
        self._encoder = Encoder()
        self._handshake = IngressHandshake(secret, ingress_id, info.engine_id, info.generation)
        self._connection: FramedConnection | None = None
        self._welcome: asyncio.Future[EngineLoad] | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.open and self._handshake.welcome is not None

    async def connect(self) -> EngineLoad:
        """Connect and shake hands; returns the engine's load. Raises `SessionLost`."""
        loop = asyncio.get_running_loop()
        self._welcome = loop.create_future()
        address = f"{self.info.host}:{self.info.session_port}"
        connection = FramedConnection(self, self._limits)
        self._connection = connection
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await loop.create_connection(lambda: connection, self.info.host, self.info.session_port)
                return await self._welcome
        except (OSError, TimeoutError) as error:
            connection.drop(f"connect failed: {error}")
            if isinstance(error, SessionLost):
                raise
            raise SessionLost(f"engine {self.info.engine_id} at {address}: {error or 'no answer'}") from error
        except asyncio.CancelledError:
            connection.drop("connect cancelled")
            raise

    def submit(self, submit: Submit) -> None:
        """Queue a request. Raises `SessionLost` where the session is gone: nothing was sent."""
        if self._connection is None or not self.connected:
            raise SessionLost(f"engine {self.info.engine_id}: no session")
        self._connection.send(self._encoder.message(SubmitMessage.of(submit)))

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """Tell the engine to forget a request, or one sample of it. Without a session there is nothing to abort."""
        if self._connection is not None:
            self._connection.send(self._encoder.message(AbortMessage(request_id, sample)))

    def migrate(self, order: Migrate) -> None:
        """Have a sample migrated, or stop that. Without a session nothing is sent: its loss tells the owner anyway."""
        if self._connection is not None:
            self._connection.send(self._encoder.message(order))

    def drop(self, reason: str) -> None:
        """End the session at once; `lost` follows with this reason."""
        if self._connection is not None:
            self._connection.drop(reason)

    async def close(self) -> None:
        """End the session after what is queued has left; an engine that does not read is cut off."""
        if self._connection is None or not self._connection.open:
            return
        self._connection.close("closed by the ingress")
        await asyncio.wait([self._connection.finished], timeout=self._limits.handshake_s)
        self._connection.drop("closed by the ingress")

    # -- ConnectionOwner --

    def opened(self) -> None:
        if self._connection is not None:
            self._connection.send(self._handshake.hello(self._encoder))

    def frame(self, frame: bytes) -> None:
        if self._handshake.welcome is None:
            self._shake_hands(frame)
            return
        message: ToIngress = decode_message(frame, ToIngress)
        if isinstance(message, StepMessage):
            self._events.step(self, message.outputs, message.load)
        else:
            self._events.notice(self, message)

    def beat(self) -> None:
        if self._connection is not None:
            self._connection.send(self._encoder.message(BeatMessage()))

    def closed(self, reason: str) -> None:
        if self._handshake.welcome is not None:
            self._events.lost(self, reason)
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(SessionLost(f"engine {self.info.engine_id}: {reason}"))

    def _shake_hands(self, frame: bytes) -> None:
        reply = self._handshake.receive(frame, self._encoder)
        if self._connection is None or self._welcome is None:
            return
        if reply is not None:
            self._connection.send(reply)
        if self._handshake.welcome is not None:
            self._connection.authenticated()
            if not self._welcome.done():
                self._welcome.set_result(self._handshake.welcome)
