"""Requests that cannot be honoured: each gets its status and the four fields, and the service lives on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbaton.cluster.client.api import EngineLost, NoEngines, Overloaded
from kvbaton.cluster.http.app import create_app
from kvbaton.engine.request import FinishReason, InvalidRequest, Request
from kvbaton.engine.text.tiny_tokenizer import VOCAB_SIZE
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import (
    MAX_MODEL_LEN,
    MODEL_ID,
    ScriptedClient,
    http_client,
    make_service,
    outputs,
    say,
    sse_events,
)
from support.openai_schema import OpenAISchema

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
CALL_TOOL = {"type": "function", "function": {"name": "f"}}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after checking its shape: exactly four fields, of the types that clients read."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert 0 < len(body["error"]["message"]) <= 1000
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


async def post(tokenizer: Tokenizer, path: str, content: bytes, client: ScriptedClient | None = None) -> httpx.Response:
    """The answer, after checking that the service still answers a good request."""
    client = client or ScriptedClient(say(tokenizer, "ok"))
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        response = await http.post(path, content=content)
        client.script = say(tokenizer, "ok")
        assert (await http.post(CHAT, json={"messages": HI})).status_code == 200
    assert client.running == set()
    return response


async def refuse(tokenizer: Tokenizer, path: str, body: object, status: int = 400) -> dict[str, Any]:
    """The error of a request that never reaches the engines."""
    client = ScriptedClient(say(tokenizer, "ok"))
    response = await post(tokenizer, path, json.dumps(body).encode(), client)
    assert len(client.requests) == 1  # the good one
    return error_of(response, status)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"messages": [}',
        b'{"messages": [{"role": "user", "content": "a"}]} x',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt":' * 5000 + b"1" + b"}" * 5000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_malformed_json(tokenizer: Tokenizer, path: str, raw: bytes) -> None:
    error = error_of(await post(tokenizer, path, raw), 400)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500


@pytest.mark.parametrize("raw", [b"null", b"3", b'"text"', b"[]"])
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_json_that_is_no_object(tokenizer: Tokenizer, path: str, raw: bytes) -> None:
    error_of(await post(tokenizer, path, raw), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 17),
        ("n", "2"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1 << 80),
        ("max_tokens", 1.5),
        ("max_tokens", MAX_MODEL_LEN),
        ("min_tokens", -1),
        ("min_tokens", 250),
        ("seed", 1 << 63),
        ("seed", "x"),
        ("stop", 3),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", "x" * 5000),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", ["a"]),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {str(VOCAB_SIZE): 1}),
        ("logit_bias", [1]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "json_object"}),
        ("response_format", 3),
        ("cache_salt", "x" * 2000),
        ("use_beam_search", True),
        ("guided_json", {}),
        ("prompt_logprobs", 1),
        ("ignore_eos", 1),
        ("model", 3),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_field_out_of_range_or_of_the_wrong_type(
    tokenizer: Tokenizer, path: str, field: str, value: object
) -> None:
    prompt: dict[str, object] = {"messages": HI} if path == CHAT else {"prompt": "Hi", "max_tokens": 20}
    error = await refuse(tokenizer, path, {**prompt, field: value})
    assert error["param"] is not None
    assert error["param"].split(".")[0].split("[")[0] == field
    assert field in error["message"] or "stop token id" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("top_k", -2, "top_k must be in [0, 2147483648], got -2"),
        ("top_k", (1 << 31) + 1, "top_k must be in [0, 2147483648], got 2147483649"),
        ("seed", 1 << 63, "seed must be in [-9223372036854775808, 9223372036854775807], got 9223372036854775808"),
        ("temperature", 2.5, "temperature must be in [0, 2], got 2.5"),
        ("presence_penalty", -3, "presence_penalty must be in [-2, 2], got -3.0"),
        ("n", 17, "n must be in [1, 16], got 17"),
        ("stop", ["a", "b", "c", "d", "e"], "stop has 5 strings; at most 4 are allowed"),
    ],
)
async def test_a_refusal_says_what_is_allowed_in_plain_numbers(
    tokenizer: Tokenizer, field: str, value: object, message: str
) -> None:
    """Guards against bounds such as 2.14748e+09, which is neither the limit nor a number that the field takes."""
    error = await refuse(tokenizer, TEXT, {"prompt": "Hi", "max_tokens": 20, field: value})
    assert error["message"] == message


async def test_four_stop_strings_are_taken(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "ab"))
    body = {"prompt": "Hi", "max_tokens": 20, "stop": ["w", "x", "y", "z"]}
    response = await post(tokenizer, TEXT, json.dumps(body).encode(), client)
    assert response.json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("digits", [400, 4200, 5000])
@pytest.mark.parametrize("field", ["n", "seed", "temperature", "max_tokens", "top_k", "logprobs", "prompt"])
async def test_numbers_with_thousands_of_digits(tokenizer: Tokenizer, field: str, digits: int) -> None:
    """Python refuses to print the largest of them: guards against an error on the way to the error."""
    number = "9" * digits
    value = f"[{number}]" if field == "prompt" else number
    raw = f'{{"prompt": "Hi", "{field}": {value}}}'.encode()
    error_of(await post(tokenizer, TEXT, raw), 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": HI, "logprobs": 3}, "logprobs"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HI, "max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"messages": HI, "tools": [CALL_TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "tools": [CALL_TOOL], "tool_choice": CALL_TOOL}, "tool_choice"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": HI, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": HI, "audio": {"voice": "x"}}, "audio"),
        ({"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "long " * 500}]}, "messages"),
    ],
)
async def test_bad_chat(tokenizer: Tokenizer, fields: dict[str, object], param: str) -> None:
    assert (await refuse(tokenizer, CHAT, fields))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1]"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 70]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [1] * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
    ],
)
async def test_bad_completion(tokenizer: Tokenizer, fields: dict[str, object], param: str) -> None:
    assert (await refuse(tokenizer, TEXT, fields))["param"] == param


async def test_context_length_names_the_numbers(tokenizer: Tokenizer) -> None:
    error = await refuse(tokenizer, TEXT, {"prompt": [1] * 200, "max_tokens": 57})
    assert error["code"] == "context_length_exceeded"
    assert "200" in error["message"]
    assert "57" in error["message"]
    assert str(MAX_MODEL_LEN) in error["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_unknown_model(tokenizer: Tokenizer, path: str) -> None:
    error = await refuse(tokenizer, path, {"model": "gpt-4", "messages": HI, "prompt": "Hi"}, status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_no_such_route_or_method(tokenizer: Tokenizer) -> None:
    async with http_client(create_app(make_service(ScriptedClient(say(tokenizer, "")), tokenizer))) as http:
        assert error_of(await http.post("/v1/embeddings", json={}), 404)["code"] == "not_found"
        wrong = await http.get(CHAT)
        assert error_of(wrong, 405)["code"] == "method_not_allowed"
        assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("the queue is full", 2.4), 429, "3"),
        (Overloaded("the queue is full", 0.0), 429, "1"),
        (NoEngines("no engine is ready"), 503, None),
        (EngineLost("gave up after 3 tries"), 503, None),
        (InvalidRequest("the prompt is larger than every pool", "prompt"), 400, None),
        (RuntimeError("/secret/path"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token(
    tokenizer: Tokenizer, error: Exception, status: int, retry_after: str | None, stream: bool
) -> None:
    """A stream too answers with the status of the failure while nothing has been sent."""
    client = ScriptedClient(lambda request: [error])
    raw = json.dumps({"prompt": "Hi", "stream": stream}).encode()
    response = await post(tokenizer, TEXT, raw, client)
    found = error_of(response, status)
    assert response.headers.get("retry-after") == retry_after
    assert found["message"] == ("internal error" if status == 500 else str(error))


@pytest.mark.parametrize("error", [EngineLost("gave up after 3 tries"), RuntimeError("/secret/path")])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_failure_in_mid_stream_is_an_event(tokenizer: Tokenizer, path: str, error: Exception) -> None:
    """Guards against a stream that just ends: clients take that for success. No [DONE] follows."""

    def script(request: Request) -> list[Any]:
        return [outputs(request, [70, 71], finish=None), error]

    raw = json.dumps({"prompt": "Hi", "messages": HI, "stream": True}).encode()
    response = await post(tokenizer, path, raw, ScriptedClient(script))
    assert response.status_code == 200
    events = [event for event in response.text.split("\n\n") if event]
    last = json.loads(events[-1].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("finish", [None, FinishReason.ABORT, FinishReason.ERROR])
async def test_an_answer_that_is_not_complete_is_never_shown_as_complete(
    tokenizer: Tokenizer, finish: FinishReason | None, stream: bool
) -> None:
    """A stream that ends early, and one whose engine gave up: an error, not a short answer."""
    client = ScriptedClient(
        lambda request: [outputs(request, [70], finish=None), outputs(request, [71], finish=finish)]
    )
    raw = json.dumps({"prompt": "Hi", "stream": stream}).encode()
    response = await post(tokenizer, TEXT, raw, client)
    if stream:
        assert '"error"' in response.text
        assert "[DONE]" not in response.text
    else:
        error_of(response, 503)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = (
    *("model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "stop"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "logprobs", "top_logprobs", "echo", "tools"),
    *("tool_choice", "stop_token_ids", "response_format", "chat_template_kwargs", "suffix", "best_of", "cache_salt"),
    *("add_special_tokens", "skip_special_tokens", "return_token_ids", "parallel_tool_calls", "modalities", "tokens"),
)
_GOOD = {"messages": HI, "prompt": "Hi", "tokens": [1]}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]),
    wild=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=3),
)
async def test_no_body_makes_the_service_stumble(tokenizer: Tokenizer, path: str, wild: dict[str, object]) -> None:
    """Any JSON at all in any field: a whole answer, or a refusal before any engine hears of it; never a 500."""
    client = ScriptedClient(say(tokenizer, "ok"))
    body = {**_GOOD, **wild}
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        response = await http.post(path, content=json.dumps(body).encode())
    if response.status_code != 200:
        wrong_model = body.get("model") not in (None, MODEL_ID)
        assert error_of(response, 404 if response.status_code == 404 and wrong_model else 400)
        assert client.requests == []
    elif path not in (CHAT, TEXT):
        assert ("tokens" if path == "/tokenize" else "prompt") in response.json()
    elif body.get("stream"):
        assert all(event["choices"] for event in sse_events(response.text))
    else:
        assert all(choice["finish_reason"] for choice in response.json()["choices"])
    assert len(client.closed) == len(client.requests)


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("value", [3, True, ["a"], {"a": 1}])
async def test_a_field_of_the_wrong_type_is_refused_whatever_the_route(
    tokenizer: Tokenizer, path: str, value: object
) -> None:
    """The routes share few fields: the model's name is one that each of them must read as text."""
    assert (await refuse(tokenizer, path, {**_GOOD, "model": value}))["param"] == "model"


@pytest.mark.shared
async def test_errors_are_openais(tokenizer: Tokenizer, schema: OpenAISchema) -> None:
    raw = json.dumps({"prompt": "Hi", "n": 99}).encode()
    schema.check("ErrorResponse", (await post(tokenizer, TEXT, raw)).json())
