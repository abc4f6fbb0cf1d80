"""An OpenAI-like server whose every byte a test decides: plain asyncio, one script a completion.

async def script(reply: Reply) -> None:
    reply.start()
    reply.token(7)
    reply.end(prompt_tokens=4, completion_tokens=1)

async with ScriptedServer(script) as server:
    ... requests to server.url ...
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

MODEL = "scripted"
Script = Callable[["Reply"], Awaitable[None]]


class Reply:
    """One completion request and the reply that the script writes to it."""

    def __init__(
        self, body: dict[str, Any], number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.body = body
        self.number = number  # 0 for the first completion that the server was asked for
        self._reader = reader
        self._writer = writer

    @property
    def warmup(self) -> bool:
        return bool(self.body["max_tokens"] == 8)

    def start(self) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self._writer.write(head.encode())

    def raw(self, data: bytes) -> None:
        """One chunk of the transfer coding."""
        self._writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, payload: dict[str, Any] | str) -> None:
        data = payload.encode() if isinstance(payload, str) else orjson.dumps(payload)
        self.raw(b"data: " + data + b"\n\n")

    def token(self, *token_ids: int, finish: str | None = None) -> None:
        choice = {"index": 0, "text": "x" * len(token_ids), "token_ids": token_ids, "finish_reason": finish}
        self.event({"object": "text_completion", "model": MODEL, "choices": [choice]})

    def text(self, text: str, finish: str | None = None) -> None:
        """A chunk of a server that does not name token ids."""
        self.event({"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})

    def usage(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> None:
        usage: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        if cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
        self.event({"object": "text_completion", "choices": [], "usage": usage})

    def finish(self) -> None:
        self.event("[DONE]")
        self.close_body()

    def close_body(self) -> None:
        """End the reply properly, whatever the events said."""
        self._writer.write(b"0\r\n\r\n")

    def error(self, status: int, message: str) -> None:
        body = orjson.dumps({"error": {"message": message, "type": "scripted", "param": None, "code": None}})
        self._writer.write(f"HTTP/1.1 {status} Scripted\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def wire(self, data: bytes) -> None:
        """Bytes straight on to the connection, HTTP or not."""
        self._writer.write(data)

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            await self._reader.read()

    def drop(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()


async def answer_all(reply: Reply) -> None:
    """The script of a well-behaved server: every token that was asked for, one a chunk."""
    count = reply.body["max_tokens"]
    reply.start()
    for token in range(count):
        reply.token(token, finish="length" if token == count - 1 else None)
    reply.usage(len(reply.body["prompt"]), count, cached_tokens=0)
    reply.finish()


class ScriptedServer:
    """Serves /v1/models, /tokenize and, by script, /v1/completions on a free loopback port."""

    def __init__(self, script: Script = answer_all, max_model_len: int = 4096, tokenize: bool = True) -> None:
        self._script = script
        self._max_model_len = max_model_len
        self._tokenize = tokenize
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.url = ""

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(x[15:]) for x in head.split("\r\n") if x.lower().startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                await self._route(head.split(" ", 2)[1], body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, which is its right
        finally:
            writer.close()
            self._handlers.discard(task)

    async def _route(self, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/completions":
            reply = Reply(orjson.loads(body), len(self.bodies), reader, writer)
            self.bodies.append(reply.body)
            await self._script(reply)
        elif path == "/v1/models":
            _json(writer, {"data": [{"id": MODEL, "object": "model", "max_model_len": self._max_model_len}]})
        elif path == "/tokenize" and self._tokenize:
            _json(writer, {"tokens": list(range(10, 60)), "count": 50})
        else:
            Reply({}, 0, reader, writer).error(404, f"no {path}")


def _json(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    body = orjson.dumps(value)
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
