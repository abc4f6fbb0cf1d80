"""CPU time that the HTTP layer costs per streamed token, without engines and without Ray.

    python benchmarks/http_path.py --streams 32 --tokens 256

A client that ticks like an engine's steps hands every stream one token at a time. `app` calls the ASGI application
directly; `uvicorn` serves it on a loopback port to a reader in another process, whose time is not counted. Each mode
is measured in a fresh process; the figure is that process's CPU time (user and system) between the first and the last
token of the run, divided by the tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from transformers import PreTrainedTokenizerFast

from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.service import ModelCard, Service
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.engine.text.tiny_tokenizer import NUM_PLAIN, VOCAB_SIZE, save_tokenizer
from kvbaton.engine.text.tokenizer import Tokenizer


class TickingClient:
    """Once `streams` requests wait, gives each of them one token a tick until all have `max_tokens`."""

    def __init__(self, streams: int) -> None:
        self.cpu_s = 0.0
        self.tokens = 0
        self._streams = streams
        self._waiting: list[tuple[Request, asyncio.Queue[list[TokenOutput]]]] = []
        self._engine: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        queue: asyncio.Queue[list[TokenOutput]] = asyncio.Queue()
        self._waiting.append((request, queue))
        if len(self._waiting) == self._streams:
            self._engine = asyncio.create_task(self._run())
        while True:
            outputs = await queue.get()
            yield outputs
            if outputs[-1].finish is not None:
                return

    async def _run(self) -> None:
        batch, self._waiting = self._waiting, []
        before = time.process_time()
        last = batch[0][0].sampling.max_tokens - 1
        for index in range(last + 1):
            for request, queue in batch:
                finish = FinishReason.LENGTH if index == last else None
                token = (index * 7919) % NUM_PLAIN
                queue.put_nowait([TokenOutput(request.request_id, 0, 0, index, token, finish=finish, cached_tokens=0)])
            await asyncio.sleep(0.002)
        self.cpu_s += time.process_time() - before
        self.tokens += len(batch) * (last + 1)

    def finish_sample(self, request_id: str, sample: int) -> None:
        raise RuntimeError("no stop strings here")

    def cancel(self, request_id: str) -> bool:
        return False

    def ready(self) -> bool:
        return True


def make_service(client: TickingClient, max_model_len: int) -> Service:
    with tempfile.TemporaryDirectory() as folder:
        special = save_tokenizer(Path(folder), max_model_len)
        tokenizer = Tokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
    card = ModelCard("tiny", VOCAB_SIZE, max_model_len, (special.im_end,))
    return Service(client=client, tokenizer=tokenizer, model=card, version="bench")


def body(tokens: int, extra: str) -> bytes:
    fields = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": "How does a message travel?"}],
        **json.loads(extra),
    }
    return json.dumps(fields).encode()


async def call_app(app: Any, raw: bytes) -> None:
    messages = [{"type": "http.request", "body": raw, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await never.wait()

    async def send(message: Any) -> None:
        pass

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
    await app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)


async def read_reply(port: int, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    while await reader.read(65536):
        pass
    writer.close()
    await writer.wait_closed()


def read_all(port: int, raw: bytes, streams: int, rounds: int) -> None:
    async def run() -> None:
        for _ in range(rounds):
            await asyncio.gather(*(read_reply(port, raw) for _ in range(streams)))

    asyncio.run(run())


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))  # connections queue here until the server accepts them
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await task


async def measure(mode: str, streams: int, tokens: int, rounds: int, extra: str) -> float:
    """CPU microseconds per token."""
    client = TickingClient(streams)
    app = create_app(make_service(client, tokens + 256))
    raw = body(tokens, extra)
    if mode == "app":
        for _ in range(rounds):
            await asyncio.gather(*(call_app(app, raw) for _ in range(streams)))
    else:
        async with serving(app) as port:
            reader = multiprocessing.get_context("spawn").Process(target=read_all, args=(port, raw, streams, rounds))
            reader.start()
            await asyncio.to_thread(reader.join)
    return client.cpu_s / client.tokens * 1e6


def measure_in_child(result: Any, mode: str, streams: int, tokens: int, rounds: int, extra: str) -> None:
    result.put(uvloop.run(measure(mode, streams, tokens, rounds, extra)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fields", default="{}", help='JSON merged into each request, such as \'{"stop": ["never"]}\'')
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for mode in ("app", "uvicorn"):
        result = spawn.Queue()
        arguments = (result, mode, options.streams, options.tokens, options.rounds, options.fields)
        child = spawn.Process(target=measure_in_child, args=arguments)
        child.start()
        print(f"{mode:8} {result.get():7.1f} CPU-us a token at {options.streams} streams")
        child.join()


if __name__ == "__main__":
    main()
