"""The engine's end of the session plane: accepts ingresses that know the cluster secret and sends each its tokens.

    connection ── handshake ──> session id ── submit/abort ──> SessionHandler
                                          <── publish ──────── one frame per engine step and ingress
                  any end ──> SessionHandler.session_lost, once

Everything runs on the event loop that called `start`. `publish` never blocks: an ingress that does not read is dropped
once `max_buffered_bytes` wait for it, and the handler hears of it as of any other loss.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Protocol

from kvbaton.cluster.session.connection import FramedConnection, SessionLimits
from kvbaton.cluster.session.handshake import EngineHandshake
from kvbaton.cluster.session.messages import AbortMessage, RefusedMessage, SubmitMessage, ToEngine, WelcomeMessage
from kvbaton.cluster.session.wire import Encoder, decode_message
from kvbaton.engine.orders import Migrate, Notice, Submit
from kvbaton.engine.request import ErrorCause, TokenOutput
from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.router.engine_info import EngineLoad

log = logging.getLogger(__name__)

_CLOSE_GRACE_S = 1.0


class SubmitRefused(RuntimeError):
    """The engine does not even take a request into its inbox, which is full; the message says how full."""


class SessionHandler(Protocol):
    """The engine's side of a session server. Called on the event loop; must not block."""

    def submit(self, session_id: int, submit: Submit) -> None:
        """Raises `SubmitRefused`."""

    def abort(self, session_id: int, request_id: str, sample: int | None) -> None:
        """Stop a request (or one sample of it) and release all it holds. Unknown ids are ignored."""

    def migrate_sample(self, session_id: int, order: Migrate) -> None:
        """Answered by a `Migrated`, unless the sample ends before."""

    def session_lost(self, session_id: int) -> None:
        """The ingress is gone: abort everything that it submitted."""


class SessionServer:
    """Listens for ingresses. `engine_id` and `generation` are what the handshake proves to them."""

    def __init__(
        self,
        handler: SessionHandler,
        host: str,
        port: int,
        secret: bytes,
        engine_id: str,
        generation: int,
        limits: SessionLimits | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits or SessionLimits()
        self.encoder = Encoder()
        self.load = EngineLoad()
        self._address = (host, port)
        self._identity = (secret, engine_id, generation)
        self._ids = itertools.count(1)
        self._open: set[_Session] = set()  # every connection, authenticated or not
        self._sessions: dict[int, _Session] = {}
        self._server: asyncio.Server | None = None

    @property
    def session_ids(self) -> tuple[int, ...]:
        return tuple(self._sessions)

    async def start(self) -> int:
        """Listen; returns the port (useful where it was 0). Raises `OSError` where it is taken."""
        host, port = self._address
        self._server = await asyncio.get_running_loop().create_server(self._accept, host, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def publish(self, session_id: int, outputs: list[TokenOutput], load: EngineLoad) -> None:
        """Send one step's tokens to one ingress. An id that is gone is ignored: its loss has been reported already."""
        self.load = load
        session = self._sessions.get(session_id)
        if session is not None:
            session.connection.send(self.encoder.step(outputs, load))

    def notify(self, session_id: int, notice: Notice) -> None:
        """Tell one ingress about a migration, after what was published before."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.connection.send(self.encoder.notice(notice))

    def publish_load(self, load: EngineLoad) -> None:
        """Tell every ingress how busy the engine is; done once a beat with the last known load in any case."""
        self.load = load
        frame = self.encoder.step((), load)
        for session in tuple(self._sessions.values()):
            session.connection.send(frame)

    async def close(self) -> None:
        """Stop listening, let queued frames leave for up to a second, and end every session."""
        if self._server is not None:
            self._server.close()
        ending = [session.connection.finished for session in self._open]
        for session in tuple(self._open):
            session.connection.close("the engine stops")
        if ending:
            await asyncio.wait(ending, timeout=_CLOSE_GRACE_S)
        for session in tuple(self._open):
            session.connection.drop("the engine stops")
        if ending:
            await asyncio.wait(ending)

    def _accept(self) -> FramedConnection:
        return _Session(self, EngineHandshake(*self._identity)).connection

    # -- called by sessions --

    def connected(self, session: _Session) -> None:
        self._open.add(session)
        if len(self._open) > self.limits.max_sessions:
            session.connection.drop(f"more than {self.limits.max_sessions} connections")

    def welcomed(self, session: _Session) -> int:
        session_id = next(self._ids)
        self._sessions[session_id] = session
        return session_id

    def disconnected(self, session: _Session) -> None:
        self._open.discard(session)
        if self._sessions.pop(session.session_id, None) is not None:
            self.handler.session_lost(session.session_id)


class _Session:
    """One connection, from its first byte to its loss. `session_id` is 0 until the handshake is done."""

    def __init__(self, server: SessionServer, handshake: EngineHandshake) -> None:
        self._server = server
        self._handshake = handshake
        self.session_id = 0
        self.connection = FramedConnection(self, server.limits)

    def opened(self) -> None:
        self._server.connected(self)

    def frame(self, frame: bytes) -> None:
        if not self._handshake.done:
            self._shake_hands(frame)
            return
        message: ToEngine = decode_message(frame, ToEngine)
        if isinstance(message, SubmitMessage):
            self._submit(message.submit())
        elif isinstance(message, AbortMessage):
            self._server.handler.abort(self.session_id, message.request_id, message.sample)
        elif isinstance(message, Migrate):
            self._server.handler.migrate_sample(self.session_id, message)

    def beat(self) -> None:
        self.connection.send(self._server.encoder.step((), self._server.load))

    def closed(self, reason: str) -> None:
        if self._handshake.done:
            log.info("ingress %s: session %d ended: %s", self._handshake.ingress_id, self.session_id, reason)
        else:
            log.warning("connection from %s refused: %s", self.connection.remote, reason)
        self._server.disconnected(self)

    def _shake_hands(self, frame: bytes) -> None:
        encoder = self._server.encoder
        try:
            reply = self._handshake.receive(frame, encoder)
        except HandshakeRefused as refusal:
            self.connection.send(encoder.message(RefusedMessage(str(refusal))))
            raise
        if reply is not None:
            self.connection.send(reply)
            return
        self.session_id = self._server.welcomed(self)
        self.connection.authenticated()
        self.connection.send(encoder.message(WelcomeMessage(self.session_id, self._server.load)))
        log.info("ingress %s: session %d opened", self._handshake.ingress_id, self.session_id)

    def _submit(self, submit: Submit) -> None:
        """Hand over one request; what the handler cannot take is answered, and the session lives on."""
        try:
            self._server.handler.submit(self.session_id, submit)
        except SubmitRefused as refusal:
            self._refuse(submit, str(refusal), ErrorCause.QUEUE_FULL)
        except Exception as error:
            log.exception("request %s: the engine failed to take it", submit.request.request_id)
            self._refuse(submit, f"{type(error).__name__}: {error}")

    def _refuse(self, submit: Submit, reason: str, cause: ErrorCause | None = None) -> None:
        self._server.publish(self.session_id, submit.refused(reason, cause), self._server.load)
