"""Every reply and every stream chunk against OpenAI's own schema."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.cluster.http.app import create_app
from kvbaton.engine.request import FinishReason
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import MODEL_ID, ScriptedClient, http_client, make_service, say, sse_events
from support.openai_schema import OpenAISchema

pytestmark = pytest.mark.shared

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = 'Adding.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "sub"}</tool_call>'
CHATS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3},
    {"logprobs": True, "top_logprobs": 3},
    {"logprobs": True},
    {"tools": [TOOL]},
    {"tools": [TOOL], "logprobs": True, "n": 2},
    {"return_token_ids": True},
    {"stop": ["Add"]},
)
COMPLETIONS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 2, "prompt": ["a", "b"]},
    {"logprobs": 2},
    {"logprobs": 0, "echo": True},
    {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"return_token_ids": True, "echo": True},
)


async def ask(tokenizer: Tokenizer, path: str, body: dict[str, Any], finish: FinishReason) -> Any:
    app = create_app(make_service(ScriptedClient(say(tokenizer, CALL, finish)), tokenizer))
    async with http_client(app) as http:
        response = await http.post(path, json={"model": MODEL_ID, "prompt": "Hi", **body})
    assert response.status_code == 200, response.text
    return sse_events(response.text) if body.get("stream") else response.json()


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
@pytest.mark.parametrize("fields", CHATS)
async def test_chat(tokenizer: Tokenizer, schema: OpenAISchema, fields: dict[str, Any], finish: FinishReason) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    path = "/v1/chat/completions"
    schema.check("CreateChatCompletionResponse", await ask(tokenizer, path, body, finish))
    for options in (None, {"include_usage": True}):
        events = await ask(tokenizer, path, {**body, "stream": True, "stream_options": options}, finish)
        for event in events:
            schema.check("CreateChatCompletionStreamResponse", event)


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
@pytest.mark.parametrize("fields", COMPLETIONS)
async def test_completion(
    tokenizer: Tokenizer, schema: OpenAISchema, fields: dict[str, Any], finish: FinishReason
) -> None:
    schema.check("CreateCompletionResponse", await ask(tokenizer, "/v1/completions", fields, finish))
    for options in (None, {"include_usage": True}):
        body = {**fields, "stream": True, "stream_options": options}
        for event in await ask(tokenizer, "/v1/completions", body, finish):
            schema.check("CreateCompletionStreamResponse", event)


async def test_models(tokenizer: Tokenizer, schema: OpenAISchema) -> None:
    async with http_client(create_app(make_service(ScriptedClient(say(tokenizer, "")), tokenizer))) as http:
        models = (await http.get("/v1/models")).json()
        schema.check("ListModelsResponse", models)
        schema.check("Model", (await http.get(f"/v1/models/{MODEL_ID}")).json())
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [(MODEL_ID, 256)]


def test_the_schema_can_fail(schema: OpenAISchema) -> None:
    """Guards against a mended document that accepts anything."""
    choice = {"index": 0, "delta": {}, "finish_reason": "abort"}
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    with pytest.raises(AssertionError, match="finish_reason"):
        schema.check("CreateChatCompletionStreamResponse", chunk)
    with pytest.raises(AssertionError, match="choices"):
        schema.check(
            "CreateCompletionStreamResponse", {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
        )
