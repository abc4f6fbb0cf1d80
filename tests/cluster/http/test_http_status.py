"""`/health`, `/ready`, `/version`, `/metrics`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families

from kvbaton.cluster.http.app import create_app
from kvbaton.engine.request import Request
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import (
    MAX_MODEL_LEN,
    RawCall,
    ScriptedClient,
    Step,
    chat_prompt,
    http_client,
    make_service,
    outputs,
    say,
)


async def test_ready_follows_the_engines_and_health_does_not(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, ""), ready=False)
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        assert (await http.get("/health")).status_code == 200
        waiting = await http.get("/ready")
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "not_ready")
        client.is_ready = True
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/version")).json() == {"version": "0.0.test"}


def samples(text: str) -> dict[str, float]:
    """Value by name and labels; the parser refuses text that Prometheus would refuse."""
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_tokens_and_times(tokenizer: Tokenizer) -> None:
    """On a clock that stands still but for the script: 2 s to the first token, then 0.5 s and 0.5 s."""
    now = 100.0

    def script(request: Request) -> Any:
        nonlocal now
        steps = outputs(request, [70, 71, 72], cached=1)
        for delay, step in zip((2.0, 0.5, 0.5), steps, strict=True):
            now += delay
            yield [step]

    service = make_service(
        ScriptedClient(script),
        tokenizer,
        clock=lambda: now,
    )
    Gauge("engine_x", "What somebody else registers.", registry=service.metrics.registry).set(4)
    async with http_client(create_app(service)) as http:
        await http.post("/v1/completions", json={"prompt": [1, 2]})
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = samples(response.text)
    assert found["engine_x"] == 4
    assert found["kvbaton_http_prompt_tokens_total"] == 2
    assert found["kvbaton_http_cached_prompt_tokens_total"] == 1
    assert found["kvbaton_http_generated_tokens_total"] == 3
    assert found["kvbaton_http_samples_finished_total[length]"] == 1
    assert found["kvbaton_http_time_to_first_token_seconds_sum"] == 2.0
    assert found["kvbaton_http_inter_token_latency_seconds_sum"] == 1.0
    assert found["kvbaton_http_inter_token_latency_seconds_count"] == 2
    assert found["kvbaton_http_request_duration_seconds_sum"] == 3.0
    assert found["kvbaton_http_requests_in_flight"] == 1  # the scrape itself


async def test_metrics_count_those_who_left(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [outputs(request, [70, 71], finish=None), asyncio.Event()]

    service = make_service(ScriptedClient(script), tokenizer)
    app = create_app(service)
    call = RawCall(app, "/v1/completions", {"prompt": [1], "n": 2, "stream": True})
    await call.first_chunk.wait()
    call.leave()
    await call.task
    found = samples(service.metrics.render())
    assert found["kvbaton_http_samples_finished_total[abandoned]"] == 2
    assert found["kvbaton_http_generated_tokens_total"] == 2
    assert found["kvbaton_http_requests_in_flight"] == 0
    assert found["kvbaton_http_responses_total[/v1/completions][200]"] == 1


async def test_two_applications_share_nothing(tokenizer: Tokenizer) -> None:
    first = make_service(ScriptedClient(say(tokenizer, "a")), tokenizer)
    second = make_service(ScriptedClient(say(tokenizer, "b")), tokenizer)
    async with http_client(create_app(first)) as one, http_client(create_app(second)) as two:
        assert (await one.post("/v1/completions", json={"prompt": "x"})).json()["choices"][0]["text"] == "a"
        assert (await two.post("/v1/completions", json={"prompt": "x"})).json()["choices"][0]["text"] == "b"
    assert samples(first.metrics.render())["kvbaton_http_generated_tokens_total"] == 1


async def call(tokenizer: Tokenizer, path: str, body: dict[str, Any], status: int = 200) -> Any:
    async with http_client(create_app(make_service(ScriptedClient(say(tokenizer, "")), tokenizer))) as http:
        response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize("special", [True, False])
async def test_tokenize_text(tokenizer: Tokenizer, special: bool) -> None:
    body = {"prompt": "Hi é", "add_special_tokens": special, "return_token_strs": True}
    ids = tokenizer.encode("Hi é", special)
    assert await call(tokenizer, "/tokenize", body) == {
        "count": len(ids),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": ids,
        "token_strs": [tokenizer.token_text(token) for token in ids],
    }


async def test_tokenize_messages_as_a_chat_would(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    found = await call(tokenizer, "/tokenize", {"messages": messages})
    assert found["tokens"] == chat_prompt(tokenizer, messages)
    without = await call(tokenizer, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert without["tokens"] == chat_prompt(tokenizer, messages, add_generation_prompt=False)


async def test_long_text_is_tokenized_in_a_thread_alike(tokenizer: Tokenizer) -> None:
    text = "The harbour wakes. " * 5000
    assert (await call(tokenizer, "/tokenize", {"prompt": text}))["tokens"] == tokenizer.encode(text)


async def test_detokenize(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hi é 😀")
    assert await call(tokenizer, "/detokenize", {"tokens": ids}) == {"prompt": "<|bos|>Hi é 😀"}
    assert await call(tokenizer, "/detokenize", {"tokens": []}) == {"prompt": ""}
    assert (await call(tokenizer, "/detokenize", {"tokens": [9999]}, 400))["error"]["param"] == "tokens"
    assert (await call(tokenizer, "/detokenize", {"tokens": ["a"]}, 400))["error"]["param"] == "tokens[0]"
    assert (await call(tokenizer, "/tokenize", {"prompt": 3}, 400))["error"]["param"] == "prompt"
    assert (await call(tokenizer, "/tokenize", {"prompt": "a", "model": "x"}, 404))["error"]["param"] == "model"
