"""A client that leaves, in every state of a call: its token stream is closed once, which aborts it on the engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvbaton.cluster.http.app import create_app
from kvbaton.engine.request import Request
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import RawCall, ScriptedClient, Step, make_service, outputs, say

PATH = "/v1/completions"


def waits_in_queue(request: Request) -> list[Step]:
    return [asyncio.Event()]


def waits_in_mid_stream(request: Request) -> list[Step]:
    return [outputs(request, [70, 71, 72], finish=None), asyncio.Event()]


def waits_for_its_end(request: Request) -> list[Step]:
    """Every token is out; only the end of the stream is missing."""
    return [outputs(request, [70, 71, 72]), asyncio.Event()]


@pytest.mark.parametrize("script", [waits_in_queue, waits_in_mid_stream, waits_for_its_end])
@pytest.mark.parametrize("prompt", [[1], [[1], [2], [3]]])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving(tokenizer: Tokenizer, script: Any, prompt: Any, stream: bool) -> None:
    client = ScriptedClient(script)
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": prompt, "stream": stream})
    count = 1 if prompt == [1] else 3
    async with asyncio.timeout(20):
        while len(client.requests) < count:
            client.started.clear()
            await client.started.wait()
        if stream and script is not waits_in_queue:
            await call.first_chunk.wait()
        call.leave()
        await call.task
    assert sorted(client.closed) == sorted(client.aborted) == sorted(request.request_id for request in client.requests)
    assert len(client.closed) == count
    assert client.running == set()
    assert not any(b"[DONE]" in message.get("body", b"") for message in call.sent)


@pytest.mark.parametrize("script", [waits_in_queue, waits_in_mid_stream])
@pytest.mark.parametrize("prompt", [[1], [[1], [2]]])
async def test_a_cancelled_call_closes_its_streams(tokenizer: Tokenizer, script: Any, prompt: Any) -> None:
    """A server that stops, or a proxy that cancels, does so by cancelling the task: twice, if it is impatient."""
    client = ScriptedClient(script)
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": prompt, "stream": True})
    async with asyncio.timeout(20):
        await client.started.wait()
        await asyncio.sleep(0)
        call.task.cancel()
        await asyncio.sleep(0)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        await client.all_closed.wait()
    assert sorted(client.closed) == sorted(request.request_id for request in client.requests)
    assert client.running == set()


async def test_a_close_under_way_survives_a_second_cancellation(tokenizer: Tokenizer) -> None:
    """Closing takes a while (an abort is sent): a second cancellation in the middle must not cut it short."""
    closing, may_close = asyncio.Event(), asyncio.Event()

    class SlowToClose(ScriptedClient):
        async def _play(self, request: Request) -> Any:
            try:
                yield outputs(request, [70], finish=None)
                await asyncio.Event().wait()
            finally:
                closing.set()
                await may_close.wait()
                self.closed.append(request.request_id)
                self.all_closed.set()

    client = SlowToClose(say(tokenizer, ""))
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": [1], "stream": True})
    async with asyncio.timeout(20):
        await call.first_chunk.wait()
        call.task.cancel()
        await closing.wait()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        may_close.set()
        await client.all_closed.wait()
    assert len(client.closed) == 1


async def test_a_send_that_fails_closes_the_stream(tokenizer: Tokenizer) -> None:
    """Servers may report a lost connection by an error of `send` instead of a message."""
    client = ScriptedClient(waits_in_mid_stream)
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": [1], "stream": True})
    call.fail_sends = OSError("broken pipe")
    async with asyncio.timeout(20):
        with pytest.raises(OSError, match="broken pipe"):
            await call.task
    assert client.closed == client.aborted == [client.requests[0].request_id]


async def test_a_finished_call_aborts_nothing(tokenizer: Tokenizer) -> None:
    """The client leaves after the last token, as all do: nothing is left to abort."""
    client = ScriptedClient(say(tokenizer, "done"))
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": [1], "stream": True})
    async with asyncio.timeout(20):
        await call.task
    call.leave()
    assert client.closed == [client.requests[0].request_id]
    assert client.aborted == []
    assert call.sent[-1]["body"].endswith(b"data: [DONE]\n\n")


async def test_siblings_are_aborted_when_one_prompt_fails(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [RuntimeError("lost")] if request.prompt == (2,) else [asyncio.Event()]

    client = ScriptedClient(script)
    call = RawCall(create_app(make_service(client, tokenizer)), PATH, {"prompt": [[1], [2], [3]]})
    async with asyncio.timeout(20):
        await call.task
    assert call.sent[0]["status"] == 500
    assert len(client.closed) == len(client.requests) == 3
    assert client.running == set()
