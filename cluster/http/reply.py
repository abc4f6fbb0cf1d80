"""Answers that wait for tokens, as ASGI responses: one that streams, one that is sent whole.

    call made -> first tokens (or an error: its HTTP status) -> more tokens -> end (or an error: an SSE event)

A client that leaves is noticed in every one of these states, by a task that does nothing but wait for it. Then, as at
every other end, the generation is closed, which aborts what still runs on the engines.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvbaton.cluster.client.api import ServiceError
from kvbaton.cluster.http.answer import Renderer
from kvbaton.cluster.http.errors import INTERNAL_ERROR, ErrorBody, from_invalid_request, from_service_error, send_error
from kvbaton.cluster.http.generation import Generation
from kvbaton.engine.request import InvalidRequest

logger = logging.getLogger(__name__)

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class GenerationReply(Response):
    """Runs until the answer is sent or the client has left, and then closes the generation."""

    def __init__(self, generation: Generation, renderer: Renderer, stream: bool) -> None:
        self.background = None
        self.status_code = 200
        self._generation = generation
        self._renderer = renderer
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send))
        left = asyncio.create_task(_client_left(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
            # Not gather: a second cancellation of this task must not reach work, which may be closing its streams.
            await asyncio.wait((work, left))
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _work(self, send: Send) -> None:
        try:
            await (self._send_stream(send) if self._stream else self._send_whole(send))
        finally:
            await self._generation.aclose()

    async def _send_stream(self, send: Send) -> None:
        """Server-sent events. The status line waits for the first tokens, so that a refusal has its own status."""
        step = await self._next()
        if isinstance(step, ErrorBody):
            await send_error(send, step)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        while isinstance(step, bytes):
            if step:
                await send({"type": "http.response.body", "body": step, "more_body": True})
            step = await self._next()
        # No [DONE] after an error: a client that overlooks the event must not take the answer for complete.
        last = error_event(step) if step is not None else self._renderer.close(self._generation.usage())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_whole(self, send: Send) -> None:
        """One JSON body."""
        step = await self._next()
        while isinstance(step, bytes):
            step = await self._next()
        if step is not None:
            await send_error(send, step)
            return
        body = self._renderer.close(self._generation.usage())
        await send(_json_start(body))
        await send({"type": "http.response.body", "body": body})

    async def _next(self) -> bytes | ErrorBody | None:
        """Rendered deltas, an error to report, or None at the end."""
        try:
            deltas = await self._generation.next()
            return None if deltas is None else self._renderer.render(deltas)
        except ServiceError as error:
            return from_service_error(error)
        except InvalidRequest as error:  # what only the cluster can know, such as a prompt larger than every KV pool
            return from_invalid_request(error)
        except Exception:
            logger.exception("a generation failed")
            return INTERNAL_ERROR


def error_event(error: ErrorBody) -> bytes:
    return b"data: " + error.json() + b"\n\n"


async def _client_left(receive: Receive) -> None:
    """Returns when the client has disconnected, or when the server can no longer say."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:
        logger.info("the connection of a client failed: %s", error)


def _json_start(body: bytes) -> Message:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}
