"""What every call passes first: keys, the cap on bodies, ids, and the last net for errors."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.gate import DISCARD_BYTES, Front
from kvbaton.cluster.http.limits import HttpLimits
from kvbaton.cluster.http.metrics import HttpMetrics
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import ScriptedClient, http_client, make_service, say

TEXT = "/v1/completions"
GOOD = {"prompt": "Hi"}


@pytest.fixture
def app(tokenizer: Tokenizer) -> FastAPI:
    service = make_service(
        ScriptedClient(say(tokenizer, "ok")),
        tokenizer,
        api_keys=("first-key", "second-key"),
        limits=HttpLimits(max_body_bytes=1024),
    )
    return create_app(service)


KEY = {"authorization": "Bearer second-key"}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer third"}, {"authorization": "Basic second-key"}])
@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models", "/nope"])
async def test_no_entry_without_a_key(app: FastAPI, path: str, headers: dict[str, str]) -> None:
    async with http_client(app) as http:
        response = await http.post(path, json=GOOD, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", ["Bearer first-key", "bearer second-key", "Bearer  first-key "])
async def test_each_key_opens(app: FastAPI, key: str) -> None:
    async with http_client(app) as http:
        assert (await http.post(TEXT, json=GOOD, headers={"authorization": key})).status_code == 200


async def test_probes_need_no_key(app: FastAPI) -> None:
    async with http_client(app) as http:
        for path in ("/health", "/ping", "/ready", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200
        answer = await http.post("/ping")
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 200), ("", 200)])
async def test_a_compressed_body_is_refused_by_name(app: FastAPI, encoding: str, status: int) -> None:
    """Guards a client that compresses, which was told that its JSON is not valid."""
    body = json.dumps(GOOD).encode()
    body = gzip.compress(body) if status == 415 else body
    async with http_client(app) as http:
        response = await http.post(TEXT, content=body, headers=KEY | {"content-encoding": encoding})
    assert response.status_code == status
    if status == 415:
        assert response.json()["error"]["code"] == "unsupported_encoding"


async def test_tokenize_is_under_v1_too(app: FastAPI) -> None:
    async with http_client(app) as http:
        plain, v1 = [await http.post(f"{at}/tokenize", json=GOOD, headers=KEY) for at in ("", "/v1")]
        assert plain.json() == v1.json()
        back = await http.post("/v1/detokenize", json={"tokens": v1.json()["tokens"]}, headers=KEY)
        assert "Hi" in back.json()["prompt"]


class EndlessBody:
    """A client that never stops writing. `reads_before_answer` is what was read until the answer was complete."""

    def __init__(self, piece: int) -> None:
        self.sent: list[Any] = []
        self.reads = 0
        self.reads_before_answer = -1
        self._piece = b"x" * piece

    async def receive(self) -> Any:
        self.reads += 1
        return {"type": "http.request", "body": self._piece, "more_body": True}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and self.reads_before_answer < 0:
            self.reads_before_answer = self.reads
        self.sent.append(message)

    def error(self) -> Any:
        head, body, end = self.sent
        assert head["status"] == 413
        assert (b"connection", b"close") in head["headers"]
        assert (b"content-length", str(len(body["body"])).encode()) in head["headers"]
        assert end["body"] == b""
        return json.loads(body["body"])["error"]


async def test_a_body_of_declared_length_past_the_cap_is_answered_unread(app: FastAPI) -> None:
    """What comes after the answer is thrown away, up to a limit, so that a client that writes first can read it."""
    body = EndlessBody(1 << 20)
    await call_raw(app, body, [(b"content-length", b"50000000")])
    assert body.error()["code"] == "request_too_large"
    assert body.reads_before_answer == 0
    assert body.reads == DISCARD_BYTES >> 20


async def test_a_body_of_unknown_length_is_read_up_to_the_cap(app: FastAPI) -> None:
    body = EndlessBody(300)
    await call_raw(app, body, [])
    assert body.error()["code"] == "request_too_large"
    assert body.reads_before_answer == 4


async def call_raw(app: FastAPI, body: EndlessBody, headers: list[tuple[bytes, bytes]]) -> None:
    scope = {"type": "http", "method": "POST", "path": TEXT, "raw_path": TEXT.encode(), "query_string": b""}
    scope |= {"headers": [(b"authorization", b"Bearer first-key"), *headers], "http_version": "1.1", "scheme": "http"}
    await app(scope, body.receive, body.send)


async def test_bodies_up_to_the_cap_pass(app: FastAPI) -> None:
    body = json.dumps({"prompt": "Hi", "user": ""}).encode()
    body = body.replace(b'""', b'"' + b"x" * (1024 - len(body)) + b'"')
    assert len(body) == 1024

    async def chunks() -> AsyncIterator[bytes]:
        yield body[:600]
        yield body[600:]

    async with http_client(app) as http:
        assert (await http.post(TEXT, content=body, headers=KEY)).status_code == 200
        assert (await http.post(TEXT, content=chunks(), headers=KEY)).status_code == 200
        assert (await http.post(TEXT, content=body + b" ", headers=KEY)).status_code == 413


async def test_request_ids(app: FastAPI) -> None:
    """The client's own comes back, on errors too; one that is unfit for a header, or none, gets a new one."""
    async with http_client(app) as http:
        for path in ("/health", "/nope"):
            assert (await http.get(path, headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
        ids = [(await http.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert ids[0] != ids[1]
        unfit = (await http.get("/health", headers={"x-request-id": "x" * 500})).headers["x-request-id"]
        assert len(unfit) == 32


async def test_the_last_net(caplog: pytest.LogCaptureFixture) -> None:
    """A bug anywhere inside: 500 with no internals, and the traceback in the log."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("/secret/path")

    front = Front(broken, HttpMetrics(), lambda: "id-1")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=front), base_url="http://test") as http:
        response = await http.get("/x")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-request-id"] == "id-1"
    assert "/secret/path" in caplog.text


async def test_a_client_that_leaves_before_its_body_is_complete(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """No answer, and no error in the log: nothing went wrong here."""
    body = EndlessBody(10)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    body.receive = receive  # type: ignore[method-assign]
    with caplog.at_level("WARNING"):
        await call_raw(app, body, [])
    assert body.sent == []
    assert caplog.records == []


async def test_a_reply_cut_in_the_middle_does_not_look_complete() -> None:
    """After the head is out the error goes on to the server, which cuts the connection."""

    async def breaks_late(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    front = Front(breaks_late, HttpMetrics(), lambda: "id-1")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=front), base_url="http://test") as http:
        with pytest.raises(RuntimeError, match="late"):
            await http.get("/x")


async def test_calls_are_counted_by_route_and_status(app: FastAPI) -> None:
    """By pattern: clients must not be able to make new time series with paths of their own."""
    async with http_client(app) as http:
        await http.post(TEXT, json=GOOD, headers=KEY)
        await http.post(TEXT, json={}, headers=KEY)
        await http.get("/v1/models/some/model", headers=KEY)
        await asyncio.gather(*(http.get(f"/wild/{number}", headers=KEY) for number in range(5)))
        text = (await http.get("/metrics")).text
    found = {
        line.rsplit(" ", 1)[0]: line.rsplit(" ", 1)[1] for line in text.splitlines() if "_responses_total{" in line
    }
    name = "kvbaton_http_responses_total"
    assert found == {
        f'{name}{{route="/v1/completions",status="200"}}': "1.0",
        f'{name}{{route="/v1/completions",status="400"}}': "1.0",
        f'{name}{{route="/v1/models/{{model:path}}",status="404"}}': "1.0",
        f'{name}{{route="none",status="404"}}': "5.0",
    }
