"""What every call passes first, in plain ASGI: an id, a count, the key, the body's size, and the net under it all.

    Front:  X-Request-Id, metrics, 500 for what nobody caught      ->      Gate:  401, 413, 415      ->      the routes

Wrapping `send` costs well under a microsecond a token; Starlette's BaseHTTPMiddleware costs a task and a queue a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable, Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbaton.cluster.http.errors import INTERNAL_ERROR, ErrorBody, error_start, send_error
from kvbaton.cluster.http.metrics import HttpMetrics

logger = logging.getLogger(__name__)

MAX_ID_CHARS = 128
# Of a refused body: how much, and how long, is read only to be thrown away.
DISCARD_BYTES = 64 << 20
DISCARD_S = 10.0
ENCODED = ErrorBody(
    415, "compressed bodies are not read: send it without content-encoding", code="unsupported_encoding"
)
# Probes and scrapers carry no key.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/version", "/metrics"})


class Front:
    """The outermost layer: whatever happens inside, a client gets an answer with its id."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, new_id: Callable[[], str]) -> None:
        self._app = app
        self._metrics = metrics
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tagged = _TaggedSend(send, _request_id(scope) or self._new_id().encode())
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            logger.info("a client left while its body was being read")
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if tagged.status is not None:
                raise  # the server closes the connection; a cut reply must not look complete
            await send_error(tagged, INTERNAL_ERROR)
        finally:
            self._metrics.in_flight.dec()
            self._metrics.responses.labels(_route(scope), str(tagged.status or "none")).inc()


class _TaggedSend:
    """Adds the id to the head of the answer and remembers the status."""

    __slots__ = ("_id", "_send", "status")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self.status: int | None = None
        self._send = send
        self._id = request_id

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self._id)]}
        await self._send(message)


class BodyTooLarge(Exception):
    """Raised out of `receive` once a body without a declared length has grown past the cap."""


class Gate:
    """Refuses calls without a key, and bodies that are compressed or past the cap, before any of the body is read where
    its length is known."""

    def __init__(self, app: ASGIApp, api_keys: Iterable[str], max_body_bytes: int) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._may_enter(scope):
            await send_error(send, ErrorBody(401, "missing or wrong API key", code="invalid_api_key"))
        elif _header(scope, b"content-encoding").strip().lower() not in (b"", b"identity"):
            await _refuse_body(ENCODED, receive, send)
        elif _declared_length(scope) > self._max_body_bytes:
            await _refuse_body(self._too_large(), receive, send)
        else:
            try:
                await self._app(scope, _CappedReceive(receive, self._max_body_bytes), send)
            except BodyTooLarge:
                await _refuse_body(self._too_large(), receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return True
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        # No early end: the time taken says nothing of which key was nearly right.
        return sum(hmac.compare_digest(key.strip(), known) for known in self._keys) > 0

    def _too_large(self) -> ErrorBody:
        return ErrorBody(413, f"the body is larger than {self._max_body_bytes} bytes", code="request_too_large")


async def _refuse_body(body: ErrorBody, receive: Receive, send: Send) -> None:
    """Answer at once, then throw away what still comes, up to a limit, before the connection is closed.

    Closing a socket that has unread data resets it, and then a client that writes its whole body before it reads
    would see a broken pipe where the answer is.
    """
    await send(error_start(body, close=True))
    await send({"type": "http.response.body", "body": body.json(), "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            await _discard(receive, DISCARD_BYTES)
    await send({"type": "http.response.body", "body": b""})


class _CappedReceive:
    """Counts the bytes of a body as they come."""

    __slots__ = ("_left", "_receive")

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._left = max_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise BodyTooLarge
        return message


async def _discard(receive: Receive, max_bytes: int) -> None:
    while max_bytes > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        max_bytes -= len(message.get("body", b""))


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def _declared_length(scope: Scope) -> int:
    value = _header(scope, b"content-length")
    return int(value) if value.isdigit() else 0


def _request_id(scope: Scope) -> bytes | None:
    """The client's own id, if it is fit for a header of the answer."""
    value = _header(scope, b"x-request-id")
    fit = 0 < len(value) <= MAX_ID_CHARS and all(0x21 <= byte <= 0x7E for byte in value)
    return value if fit else None


def _route(scope: Scope) -> str:
    """The pattern, not the path: clients must not be able to make new time series."""
    return getattr(scope.get("route"), "path", "none")
