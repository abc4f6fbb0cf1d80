"""Calls that somebody else cancels, over one replica or several; and the limits that clients set."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from kvbaton.cluster.client.api import Cancelled, DeadlineExceeded
from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.store.cancel_feed import CancelFeed
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.engine.request import Request
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import RawCall, ScriptedClient, Step, http_client, make_service, outputs, say


def endless(request: Request) -> list[Step]:
    return [outputs(request, [70, 71], finish=None), asyncio.Event()]


async def running_call(client: ScriptedClient, tokenizer: Tokenizer, prompt: object) -> tuple[RawCall, str]:
    call = RawCall(create_app(make_service(client, tokenizer)), "/v1/completions", {"prompt": prompt, "stream": True})
    await asyncio.wait_for(call.first_chunk.wait(), 20)
    chunk = next(m["body"] for m in call.sent if m["type"] == "http.response.body")
    return call, json.loads(chunk.split(b"\n\n")[0].removeprefix(b"data: "))["id"]


async def test_call_is_cancelled_by_the_id_of_its_answer(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(endless)
    call, call_id = await running_call(client, tokenizer, [[1], [2]])
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        reply = await http.delete(f"/v1/requests/{call_id}")
        unknown = await http.delete("/v1/requests/cmpl-0")
    assert (reply.status_code, reply.json()["cancelled"]) == (200, True)
    assert unknown.status_code == 404
    assert {request.request_id for request in client.requests} <= set(client.cancelled)
    call.leave()
    await call.task


@pytest.mark.parametrize(("told", "status"), [(True, 202), (False, 503)])
async def test_other_replicas_are_told(tokenizer: Tokenizer, told: bool, status: int) -> None:
    heard: list[str] = []

    async def elsewhere(call_id: str) -> bool:
        heard.append(call_id)
        return told

    tell: Callable[[str], Awaitable[bool]] = elsewhere
    service = make_service(ScriptedClient(endless), tokenizer, cancel_elsewhere=tell)
    async with http_client(create_app(service)) as http:
        reply = await http.delete("/v1/requests/chatcmpl-7")
    assert (reply.status_code, heard) == (status, ["chatcmpl-7"])


async def test_feed_reaches_every_replica() -> None:
    store = MemoryStore()
    heard: list[tuple[int, str]] = []
    done = asyncio.Event()

    def hear(replica: int, call_id: str) -> None:
        heard.append((replica, call_id))
        if len(heard) == 4:
            done.set()

    feeds = [CancelFeed(store, lambda call_id, replica=replica: hear(replica, call_id)) for replica in (0, 1)]  # type: ignore[misc]
    for feed in feeds:
        feed.start()
    assert await feeds[0].tell("a")
    assert await feeds[1].tell("b")
    await asyncio.wait_for(done.wait(), 10)
    for feed in feeds:
        await feed.close()
    assert sorted(heard) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, None),
        ({"timeout": 2.5}, {}, 2.5),
        ({}, {"x-request-timeout": "30"}, 30.0),
        ({"timeout": 1}, {"x-request-timeout": "30"}, 1.0),
    ],
)
async def test_time_limit_reaches_the_request(
    tokenizer: Tokenizer, body: dict[str, object], headers: dict[str, str], expected: float | None
) -> None:
    client = ScriptedClient(say(tokenizer, "yes"))
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        for path, prompt in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            reply = await http.post(path, json={**prompt, **body}, headers=headers)
            assert reply.status_code == 200
    assert [request.timeout_s for request in client.requests] == [expected, expected]


async def test_malformed_time_limit_is_refused(tokenizer: Tokenizer) -> None:
    async with http_client(create_app(make_service(ScriptedClient(endless), tokenizer))) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": "soon"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "timeout")


@pytest.mark.parametrize(
    ("error", "status"), [(DeadlineExceeded("not done within 2 s"), 503), (Cancelled("it was cancelled"), 499)]
)
async def test_early_ends_have_their_status(tokenizer: Tokenizer, error: Exception, status: int) -> None:
    """Before the first byte; after it they are an error event of the stream."""
    client = ScriptedClient(lambda request: [error])
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        before = await http.post("/v1/completions", json={"prompt": "a"})
        client.script = lambda request: [outputs(request, [70], finish=None), error]
        after = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert (before.status_code, before.json()["error"]["message"]) == (status, str(error))
    assert after.status_code == 200
    assert str(error) in after.text
    assert "[DONE]" not in after.text
