"""The client's reading of a stream: token times, counts and a named kind for each way in which a reply can go wrong.

Time is moved by hand: the server's script sets the clock, writes a chunk and waits until the client has read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from kvbaton.cluster.bench.client import CompletionClient, Job, SseDecoder
from kvbaton.cluster.bench.connection import ConnectionFailed, HttpClient, parse_url
from kvbaton.cluster.bench.record import RequestRecord
from support.scripted_openai import Reply, Script, ScriptedServer, answer_all

JOB = Job(index=3, body=b'{"prompt":[1,2,3,4],"max_tokens":3}', scheduled_s=1.0, input_tokens=4, asked_tokens=3)


class HandClock:
    """Shows `now` and tells when it was read."""

    def __init__(self) -> None:
        self.now = 0.0
        self._read = asyncio.Event()

    def __call__(self) -> float:
        self._read.set()
        return self.now

    async def write_at(self, moment_s: float, write: Callable[[], None]) -> None:
        """Move time, write, and wait until the client has taken the time of what was written."""
        self.now = moment_s
        self._read.clear()
        write()
        await self._read.wait()


async def stream(script: Script, clock: Callable[[], float], timeout_s: float = 60.0) -> RequestRecord:
    async with ScriptedServer(script) as server:
        http = HttpClient(parse_url(server.url))
        try:
            return await CompletionClient(http, clock, timeout_s).run(JOB)
        finally:
            http.close()


def steady() -> Callable[[], float]:
    return lambda: 5.0


# --- times and counts


async def test_each_token_has_the_time_of_its_chunk() -> None:
    """Guards TTFT, ITL and E2E at their source, with a chunk of two tokens and a comment in between."""
    clock = HandClock()

    async def script(reply: Reply) -> None:
        reply.start()
        await clock.write_at(2.5, lambda: reply.token(11))
        await clock.write_at(2.6, lambda: reply.raw(b": keep-alive\n\n"))
        await clock.write_at(3.0, lambda: reply.token(12, 13))
        await clock.write_at(3.25, lambda: reply.token(14, finish="length"))
        await clock.write_at(3.5, lambda: reply.usage(4, 4, cached_tokens=2))
        clock.now = 4.0
        reply.finish()

    clock.now = 1.5
    record = await stream(script, clock)
    assert record.failure is None
    assert record.timeline.sent_s == 1.5
    assert record.timeline.token_times_s == (2.5, 3.0, 3.0, 3.25)
    assert record.timeline.ended_s == 4.0
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (4, 4, 2)
    assert record.exact_tokens
    assert record.ttft_s == 1.5  # from the schedule at 1.0
    assert record.ttft_sent_s == 1.0
    assert record.itl_s == [0.5, 0.0, 0.25]
    assert record.tpot_s == 0.25
    assert record.e2e_s == 3.0
    assert record.finish_reason == "length"


async def test_without_token_ids_usage_counts() -> None:
    """Guards servers that do not name tokens: times are the chunks', the count is the server's usage."""

    async def script(reply: Reply) -> None:
        reply.start()
        reply.text("")
        reply.text("two tokens")
        reply.text(" and three", finish="stop")
        reply.usage(4, 5)
        reply.finish()

    record = await stream(script, steady())
    assert record.ok
    assert not record.exact_tokens
    assert len(record.timeline.token_times_s) == 2  # the empty chunk is no token
    assert record.output_tokens == 5


async def test_bytes_cut_anywhere_give_the_same_record() -> None:
    """Guards the decoder's buffer: TCP cuts where it likes."""
    whole = (
        b'data: {"choices":[{"text":"\xc3\xa4","token_ids":[1],"finish_reason":null}]}\r\n\r\n'
        b'data: {"choices":[{"text":"b","token_ids":[2],"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )

    async def script(reply: Reply) -> None:
        reply.start()
        for position in range(len(whole)):
            reply.raw(whole[position : position + 1])
        reply.close_body()

    record = await stream(script, steady())
    assert record.ok
    assert record.output_tokens == 2


def test_sse_joins_data_lines_and_drops_the_rest() -> None:
    """Guards the event format itself: several data lines are one event, other fields are not data."""
    decoder = SseDecoder()
    assert decoder.feed(b"event: x\ndata: a\ndata:b\nid: 1\n") == []
    assert decoder.feed(b"\n: comment\n\ndata: c\n\nda") == [b"a\nb", b"c"]
    assert decoder.feed(b"ta: d\r\n\r\n") == [b"d"]


# --- failures


def after_one_token(then: Callable[[Reply], None]) -> Script:
    async def script(reply: Reply) -> None:
        reply.start()
        reply.token(1)
        then(reply)

    return script


async def refuse(reply: Reply) -> None:
    reply.error(429, "queue is full")


async def not_http(reply: Reply) -> None:
    reply.wire(b"SSH-2.0-OpenSSH\r\n")


async def no_token(reply: Reply) -> None:
    reply.start()
    reply.finish()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (refuse, "http 429", "queue is full"),
        (after_one_token(lambda r: (r.event({"error": {"message": "lost"}}), r.finish())), "stream error", "lost"),
        (after_one_token(lambda r: r.close_body()), "truncated", "without a finish reason"),
        (after_one_token(lambda r: r.drop()), "connection", "connection"),
        (after_one_token(lambda r: (r.event("{nonsense"), r.finish())), "bad chunk", "nonsense"),
        (after_one_token(lambda r: (r.event("[1]"), r.finish())), "bad chunk", "AttributeError"),
        (no_token, "no tokens", "no token"),
        (not_http, "connection", "not an HTTP reply"),
    ],
    ids=["refused", "error event", "truncated", "dropped", "bad json", "not an object", "empty", "not http"],
)
async def test_each_failure_has_a_kind(script: Script, kind: str, message: str) -> None:
    """Guards against counting a broken reply as a success, and against an exception that ends the whole run."""
    record = await stream(script, steady())
    assert record.failure is not None
    assert record.failure.kind == kind
    assert message in record.failure.message


async def test_a_stream_that_stalls_is_a_timeout() -> None:
    """Guards a run against hanging for ever on one request; what came before the stall is kept."""

    async def script(reply: Reply) -> None:
        reply.start()
        reply.token(1)
        await asyncio.Event().wait()

    record = await stream(script, steady(), timeout_s=0.2)
    assert record.failure is not None
    assert record.failure.kind == "timeout"
    assert record.output_tokens == 1


async def test_a_cancelled_request_is_interrupted_and_leaves_the_server() -> None:
    """Guards Ctrl-C: the record says interrupted, and the server sees the client leave instead of decoding on."""
    reached = asyncio.Event()
    left = asyncio.Event()

    async def script(reply: Reply) -> None:
        reply.start()
        reply.token(1)
        reached.set()
        try:
            await reply.gone()
        finally:
            left.set()

    async with ScriptedServer(script) as server:
        http = HttpClient(parse_url(server.url))
        task = asyncio.ensure_future(CompletionClient(http, steady(), 60.0).run(JOB))
        await reached.wait()
        task.cancel()
        record = await task
        assert record.interrupted
        await asyncio.wait_for(left.wait(), 10)


async def test_nothing_listens() -> None:
    """Guards the first mistake of every user: the message names host and port."""
    async with ScriptedServer() as server:
        url = server.url
    http = HttpClient(parse_url(url))
    with pytest.raises(ConnectionFailed, match=f"cannot connect to {url[7:]}") as caught:
        await http.get("/v1/models")
    assert caught.value.before_reply


# --- connections


@pytest.fixture(name="server")
async def _server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer(answer_all) as server:
        yield server


async def test_connections_are_reused_one_at_a_time(server: ScriptedServer) -> None:
    """Guards keep-alive: ten requests in a row are one connection, four at once are four."""
    http = HttpClient(parse_url(server.url))
    client = CompletionClient(http, steady(), 60.0)
    for _ in range(10):
        assert (await client.run(JOB)).ok
    assert server.connections == 1
    assert all(record.ok for record in await asyncio.gather(*(client.run(JOB) for _ in range(4))))
    assert server.connections == 4
    http.close()


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    """Guards against a failure that is the client's own: a server may close an idle connection when it likes."""

    async def script(reply: Reply) -> None:
        await answer_all(reply) if reply.number != 1 else reply.drop()

    async with ScriptedServer(script) as server:
        http = HttpClient(parse_url(server.url))
        client = CompletionClient(http, steady(), 60.0)
        assert (await client.run(JOB)).ok
        assert (await client.run(JOB)).ok
        assert (server.connections, len(server.bodies)) == (2, 3)
        http.close()


async def test_a_fresh_connection_that_fails_is_not_retried() -> None:
    """Guards the error count: a server that drops new connections must show, once a request."""

    async def script(reply: Reply) -> None:
        reply.drop()

    async with ScriptedServer(script) as server:
        http = HttpClient(parse_url(server.url))
        record = await CompletionClient(http, steady(), 60.0).run(JOB)
        assert record.failure is not None
        assert record.failure.kind == "connection"
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "path"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, False, ""),
        ("localhost:9", "localhost", 9, False, ""),
        ("https://api.example.com/v1/", "api.example.com", 443, True, ""),
        ("http://gateway/llm", "gateway", 80, False, "/llm"),
    ],
)
def test_url_forms(url: str, host: str, port: int, tls: bool, path: str) -> None:
    """Guards the forms in which users write an endpoint, the OpenAI base URL with /v1 included."""
    address = parse_url(url)
    assert (address.host, address.port, address.tls, address.path) == (host, port, tls, path)


@pytest.mark.parametrize("url", ["ftp://a", "http://", "//"])
def test_url_that_is_none(url: str) -> None:
    """Guards against a connection attempt to nowhere."""
    with pytest.raises(ValueError, match="is not an http:// or https:// address"):
        parse_url(url)


def test_ipv6_host_header_has_brackets() -> None:
    """Guards the Host header of a literal IPv6 address."""
    assert parse_url("http://[::1]:8000").host_header == "[::1]:8000"
