"""A small HTTP/1.1 client for load tests: keep-alive connections whose body bytes are handed over as they arrive.

Plain asyncio protocol callbacks instead of a stream API: the time of a token is taken in the callback that the event
loop runs for its bytes, and a chunk costs a few microseconds, so the client does not slow the server beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

BodySink = Callable[[bytes], None]


class ConnectionFailed(Exception):
    """No connection, or it broke. `before_reply` is True while not one byte of the reply had come."""

    def __init__(self, message: str, before_reply: bool) -> None:
        super().__init__(message)
        self.before_reply = before_reply


@dataclass(frozen=True, slots=True)
class Address:
    """Where the endpoint is: `path` is the URL's own path, put before every route."""

    host: str
    port: int
    tls: bool
    path: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """The address of `http[s]://host[:port][/path]`; a trailing `/v1` is dropped. Raises ValueError."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls, path)


class _Exchange:
    """One request's reply: the status when it is known, the body bytes to the sink, an end."""

    def __init__(self, sink: BodySink) -> None:
        self.sink = sink
        self.status = 0
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def fail(self, message: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionFailed(message, before_reply=self.status == 0))


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Usable again while `idle`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: _Exchange | None = None
        self._keep_alive = True

    @property
    def idle(self) -> bool:
        return self._transport is not None and self._exchange is None and self._keep_alive

    async def exchange(self, request: bytes, sink: BodySink) -> int:
        """Send one request; body bytes go to `sink` as they come; returns the HTTP status at the end of the body."""
        if self._transport is None:
            raise ConnectionFailed("the connection is closed", before_reply=True)
        self._exchange = exchange = _Exchange(sink)
        self._transport.write(request)
        try:
            return await exchange.done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection at once; the server sees a client that left."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not an HTTP reply: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(f"connection lost: {exc}" if exc else "connection closed by the server")

    def _fail(self, message: str) -> None:
        exchange, self._exchange = self._exchange, None
        self.close()
        if exchange is not None:
            exchange.fail(message)

    # --- httptools callbacks

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.sink(body)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.status < 200:
            self._exchange = exchange  # an interim reply such as 100 Continue: the real one follows
            return
        self._keep_alive = self._parser.should_keep_alive()
        if not self._keep_alive:
            self.close()
        if not exchange.done.done():
            exchange.done.set_result(exchange.status)


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes


class HttpClient:
    """Requests to one address over as many keep-alive connections as are in use at once."""

    def __init__(self, address: Address, api_key: str | None = None) -> None:
        self._address = address
        self._headers = f"Host: {address.host_header}\r\nAccept: */*\r\nUser-Agent: kvbaton-bench\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []

    async def get(self, route: str) -> Reply:
        return await self._collect("GET", route, b"")

    async def post(self, route: str, body: bytes) -> Reply:
        return await self._collect("POST", route, body)

    async def stream(self, route: str, body: bytes, sink: BodySink) -> int:
        """POST `body`; the reply's bytes go to `sink` as they arrive. Returns the HTTP status."""
        return await self._exchange("POST", route, body, sink)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _collect(self, method: str, route: str, body: bytes) -> Reply:
        parts: list[bytes] = []
        status = await self._exchange(method, route, body, parts.append)
        return Reply(status, b"".join(parts))

    async def _exchange(self, method: str, route: str, body: bytes, sink: BodySink) -> int:
        request = self._encode(method, route, body)
        reused = self._take_idle()
        if reused is not None:
            try:
                return await self._on(reused, request, sink)
            except ConnectionFailed as error:
                # A server may close an idle connection just as it is used again: not a failure of this request.
                if not error.before_reply:
                    raise
        return await self._on(await self._connect(), request, sink)

    async def _on(self, connection: Connection, request: bytes, sink: BodySink) -> int:
        status = await connection.exchange(request, sink)
        if connection.idle:
            self._idle.append(connection)
        return status

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.idle:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        address = self._address
        try:
            _, connection = await loop.create_connection(
                Connection, address.host, address.port, ssl=True if address.tls else None
            )
        except OSError as error:
            raise ConnectionFailed(f"cannot connect to {address.host_header}: {error}", before_reply=True) from error
        return connection

    def _encode(self, method: str, route: str, body: bytes) -> bytes:
        head = f"{method} {self._address.path}{route} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body
