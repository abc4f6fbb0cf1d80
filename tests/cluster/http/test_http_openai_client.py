"""The official Python client against a real server on a loopback port: what it reads is what was meant."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import uvicorn

from kvbaton.cluster.client.api import EngineLost, Overloaded
from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.limits import HttpLimits
from kvbaton.engine.request import FinishReason, Request
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import MODEL_ID, ScriptedClient, Step, make_service, outputs, say

pytestmark = pytest.mark.process  # the client asks `uname` which machine it runs on

TEXT = "The sea, é and 😀, answers."
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@contextlib.asynccontextmanager
async def serving(client: ScriptedClient, tokenizer: Tokenizer) -> AsyncIterator[str]:
    app = create_app(make_service(client, tokenizer, api_keys=("key",), limits=HttpLimits(max_body_bytes=1 << 20)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def official(client: ScriptedClient, tokenizer: Tokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        asyncio.timeout(60),
        serving(client, tokenizer) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as api,
    ):
        yield api


async def test_chat_whole_and_streamed(tokenizer: Tokenizer) -> None:
    async with official(ScriptedClient(say(tokenizer, TEXT, FinishReason.STOP)), tokenizer) as api:
        whole = await api.chat.completions.create(model=MODEL_ID, messages=HI)
        stream = await api.chat.completions.create(
            model=MODEL_ID, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 0


async def test_completions_and_models(tokenizer: Tokenizer) -> None:
    async with official(ScriptedClient(say(tokenizer, TEXT)), tokenizer) as api:
        whole = await api.completions.create(model=MODEL_ID, prompt=["a", "b"], n=2, logprobs=1)
        models = [model.id async for model in await api.models.list()]
        model = await api.models.retrieve(MODEL_ID)
    assert [choice.text for choice in whole.choices] == [TEXT] * 4
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset is not None
    assert models == [MODEL_ID] == [model.id]


async def test_logprobs(tokenizer: Tokenizer) -> None:
    async with official(ScriptedClient(say(tokenizer, "sea!")), tokenizer) as api:
        reply = await api.chat.completions.create(model=MODEL_ID, messages=HI, logprobs=True, top_logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "sea!"
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * len(logprobs.content)


async def test_tool_calls_whole_and_accumulated_by_the_client(tokenizer: Tokenizer) -> None:
    async with official(ScriptedClient(say(tokenizer, CALL_TEXT, FinishReason.STOP)), tokenizer) as api:
        whole = await api.chat.completions.create(model=MODEL_ID, messages=HI, tools=[TOOL])
        async with api.chat.completions.stream(model=MODEL_ID, messages=HI, tools=[TOOL]) as stream:
            final = await stream.get_final_completion()
    for reply in (whole, final):
        assert reply.choices[0].finish_reason == "tool_calls"
        calls = reply.choices[0].message.tool_calls
        assert calls is not None
        assert (calls[0].function.name, calls[0].function.arguments) == ("add", '{"a": 1}')
        assert calls[0].type == "function"
        assert calls[0].id


async def test_errors_are_the_clients_exceptions(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, TEXT))
    async with official(client, tokenizer) as api:
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            await api.chat.completions.create(model=MODEL_ID, messages=HI, temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(model="nope", messages=HI)
        with pytest.raises(openai.AuthenticationError):
            await api.with_options(api_key="wrong").models.list()
        client.script = lambda request: [Overloaded("busy", 7)]
        with pytest.raises(openai.RateLimitError) as busy:
            await api.chat.completions.create(model=MODEL_ID, messages=HI)
        assert busy.value.response.headers["retry-after"] == "7"


async def test_an_error_in_mid_stream_raises(tokenizer: Tokenizer) -> None:
    """Guards against a cut answer that a program takes for a whole one."""

    def script(request: Request) -> list[Step]:
        return [outputs(request, [70], finish=None), EngineLost("gave up")]

    async with official(ScriptedClient(script), tokenizer) as api:
        stream = await api.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="gave up"):
            async for _ in stream:
                pass


async def test_a_client_that_leaves_a_real_connection(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [outputs(request, [70], finish=None), asyncio.Event()]

    client = ScriptedClient(script)
    async with official(client, tokenizer) as api:
        stream = await api.completions.create(model=MODEL_ID, prompt="Hi", stream=True)
        await anext(aiter(stream))
        await stream.close()
        await client.all_closed.wait()
        assert client.aborted == [client.requests[0].request_id]
        client.all_closed.clear()
        whole = asyncio.create_task(api.completions.create(model=MODEL_ID, prompt="Hi"))
        while len(client.requests) < 2:
            client.started.clear()
            await client.started.wait()
        whole.cancel()
        await client.all_closed.wait()
    assert client.running == set()


@pytest.mark.parametrize("declared", [True, False])
async def test_fifty_megabytes(tokenizer: Tokenizer, declared: bool) -> None:
    """The refusal reaches a client that is still writing, and the next call is served."""
    piece = b"x" * (1 << 20)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield piece

    async with asyncio.timeout(60), serving(ScriptedClient(say(tokenizer, "ok")), tokenizer) as url:
        headers = {"authorization": "Bearer key"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
            big = await http.post("/v1/completions", content=piece * 50 if declared else pieces())
            assert big.status_code == 413
            assert big.json()["error"]["code"] == "request_too_large"
            assert (await http.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200
