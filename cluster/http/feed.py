"""The token streams of one call as one source: a single stream as it is, several merged by a task each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple, Protocol, cast

from kvbaton.cluster.client.api import GenerationClient
from kvbaton.engine.request import Request, TokenOutput


class Arrival(NamedTuple):
    """Outputs that came together on one stream."""

    stream: int
    outputs: list[TokenOutput]


class Feed(Protocol):
    async def next(self) -> Arrival | None:
        """None when every stream has ended. Raises what a stream raises."""
        ...

    async def stop(self, stream: int) -> None:
        """Close one stream; the others go on."""
        ...

    async def aclose(self) -> None:
        """Close all that are open, each once, however often this is called."""
        ...


class TokenStream:
    """One `generate` iterator, closed exactly once. Alone it is the feed of a call with one request: then there is no
    task and no queue between the cluster and the answer."""

    __slots__ = ("_closed", "_index", "_tokens")

    def __init__(self, client: GenerationClient, request: Request, index: int) -> None:
        # The seam promises aclose, which AsyncIterator does not have.
        self._tokens = cast("AsyncGenerator[list[TokenOutput], None]", client.generate(request))
        self._index = index
        self._closed = False

    async def next(self) -> Arrival | None:
        if self._closed:
            return None
        outputs = await anext(self._tokens, None)
        return None if outputs is None else Arrival(self._index, outputs)

    async def stop(self, stream: int) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._tokens.aclose()


class MergedFeed:
    """Several streams at once, each pumped into one queue by its own task from the first `next` on."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = list(streams)
        # A stream's end is its failure, or None.
        self._queue: asyncio.Queue[Arrival | Exception | None] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._open = len(self._streams)

    async def next(self) -> Arrival | None:
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(stream)) for stream in self._streams]
        while self._open:
            item = await self._queue.get()
            if isinstance(item, Arrival):
                return item
            self._open -= 1
            if item is not None:
                raise item
        return None

    async def _pump(self, stream: TokenStream) -> None:
        failure: Exception | None = None
        try:
            while (arrival := await stream.next()) is not None:
                self._queue.put_nowait(arrival)
        except Exception as error:
            failure = error  # raised again by next(), in the task that answers the client
        finally:
            self._queue.put_nowait(failure)

    async def stop(self, stream: int) -> None:
        await _cancel([self._pumps[stream]])
        await self._streams[stream].aclose()

    async def aclose(self) -> None:
        await _cancel(self._pumps)
        async with AsyncExitStack() as stack:  # one that fails to close does not keep the others open
            for stream in self._streams:
                stack.push_async_callback(stream.aclose)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel and wait: a generator that still runs in its pump cannot be closed from here."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def open_feed(client: GenerationClient, requests: Sequence[Request]) -> Feed:
    """The feed of a call's requests, one stream each in their order."""
    streams = [TokenStream(client, request, index) for index, request in enumerate(requests)]
    return streams[0] if len(streams) == 1 else MergedFeed(streams)
