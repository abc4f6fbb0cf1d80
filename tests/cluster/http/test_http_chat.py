"""`/v1/chat/completions`: what the prompt becomes, and what whole and streamed answers hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kvbaton.cluster.http.app import create_app
from kvbaton.engine.request import FinishReason, Request, SamplingParams
from kvbaton.engine.text.tiny_tokenizer import save_tokenizer
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import (
    MAX_MODEL_LEN,
    MODEL_ID,
    ScriptedClient,
    Step,
    chat_prompt,
    end_token,
    http_client,
    make_service,
    outputs,
    say,
    sse_events,
)

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
TEXT = "The sea, é and 😀, answers."


async def ask(client: ScriptedClient, tokenizer: Tokenizer, **fields: Any) -> Any:
    """The parsed body, or the list of events of a stream."""
    body = {"model": MODEL_ID, "messages": HI, **fields}
    async with http_client(create_app(make_service(client, tokenizer, new_seed=lambda: 77))) as http:
        response = await http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        assert response.headers["content-type"] == "application/json"
        return response.json()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return sse_events(response.text)


def joined(events: list[dict[str, Any]], choice: int = 0) -> str:
    deltas = [c["delta"] for event in events for c in event["choices"] if c["index"] == choice]
    return "".join(delta.get("content") or "" for delta in deltas)


async def test_whole_answer(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, TEXT, FinishReason.STOP))
    reply = await ask(client, tokenizer)
    assert reply["object"] == "chat.completion"
    assert reply["model"] == MODEL_ID
    assert reply["id"].startswith("chatcmpl-")
    assert type(reply["created"]) is int
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt = chat_prompt(tokenizer, HI)
    completion = len(tokenizer.encode(TEXT, add_special_tokens=False)) + 1  # the end token counts, and is not shown
    assert client.requests[0].prompt == tuple(prompt)
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": completion,
        "total_tokens": len(prompt) + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert client.closed == [client.requests[0].request_id]
    assert client.aborted == []


async def test_streamed_answer(tokenizer: Tokenizer) -> None:
    """The role first and alone, no chunk without text, one id, and text that joins to the whole."""
    events = await ask(ScriptedClient(say(tokenizer, TEXT)), tokenizer, stream=True)
    first, *rest = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(events) == TEXT
    assert all(event["choices"][0]["delta"].get("content") for event in rest)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len({(event["id"], event["created"], event["object"]) for event in events}) == 1
    assert not any("usage" in event for event in events)


async def test_usage_comes_in_a_last_chunk_without_choices(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [outputs(request, [70, 71], cached=16)]

    client = ScriptedClient(script)
    events = await ask(client, tokenizer, stream=True, stream_options={"include_usage": True})
    *others, last = events
    assert all(event["usage"] is None for event in others)
    assert last["choices"] == []
    prompt = len(client.requests[0].prompt)
    assert last["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 2,
        "total_tokens": prompt + 2,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_running_usage_counts_in_every_chunk(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [[one] for one in outputs(request, [70, 71, 72])]

    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await ask(ScriptedClient(script), tokenizer, stream=True, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 1, 2, 3, 3]


async def test_samples_are_choices(tokenizer: Tokenizer) -> None:
    """Guards against mixing up the samples of a list that has several."""

    def script(request: Request) -> list[Step]:
        rows = [outputs(request, tokenizer.encode(f"<{i}é>", False), i) for i in request.sample_indices]
        return [
            [one for row in rows for one in row[: len(row) // 2]],
            [o for row in rows for o in row[len(row) // 2 :]],
        ]

    whole = await ask(ScriptedClient(script), tokenizer, n=3)
    assert [(c["index"], c["message"]["content"]) for c in whole["choices"]] == [(0, "<0é>"), (1, "<1é>"), (2, "<2é>")]
    events = await ask(ScriptedClient(script), tokenizer, n=3, stream=True)
    assert [joined(events, choice) for choice in range(3)] == ["<0é>", "<1é>", "<2é>"]
    roles = [c["index"] for event in events for c in event["choices"] if "role" in c["delta"]]
    assert roles == [0, 1, 2]


async def test_sampling_reaches_the_engine(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    fields = {
        "max_completion_tokens": 9,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 2},
        "seed": -3,
        "n": 2,
        "min_tokens": 2,
        "stop_token_ids": [9],
        "logprobs": True,
        "top_logprobs": 4,
    }
    await ask(client, tokenizer, **fields, cache_salt="tenant")
    assert client.requests[0].sampling == SamplingParams(
        max_tokens=9,
        seed=-3,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias=((5, 2.0),),
        logprobs=4,
        n=2,
        min_tokens=2,
        stop_token_ids=(9, end_token(tokenizer)),
    )
    assert client.requests[0].cache_salt == "tenant"
    assert client.requests[0].sample_indices == (0, 1)


async def test_defaults_seed_and_room(tokenizer: Tokenizer) -> None:
    """No seed: a concrete random one. No limit: what the context leaves. ignore_eos: no end token. Nulls: defaults."""
    client = ScriptedClient(say(tokenizer, "ok"))
    await ask(client, tokenizer, ignore_eos=True, temperature=None, top_k=-1, n=None, stop=None, user="u", unknown=[1])
    request = client.requests[0]
    room = MAX_MODEL_LEN - len(request.prompt)
    assert request.sampling == SamplingParams(max_tokens=room, seed=77, ignore_eos=True)


async def test_messages_as_clients_write_them(tokenizer: Tokenizer) -> None:
    """Text parts, null content, developer, tool calls and results."""
    client = ScriptedClient(say(tokenizer, "ok"))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "al"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    await ask(client, tokenizer, messages=messages)
    assert tokenizer.decode(client.requests[0].prompt, skip_special_tokens=False) == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_many_messages_are_read_off_the_loop_alike(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    messages = [{"role": "user", "content": ""}] * 450
    service = make_service(client, tokenizer)
    roomy = replace(service, model=replace(service.model, max_model_len=1 << 16))
    async with http_client(create_app(roomy)) as http:
        response = await http.post(PATH, json={"messages": messages})
    assert response.status_code == 200, response.text
    assert client.requests[0].prompt == tuple(chat_prompt(tokenizer, messages))


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}, {"add_generation_prompt": None}])
async def test_continue_final_message(tokenizer: Tokenizer, more: dict[str, Any]) -> None:
    """No new turn begins where the last one goes on: nobody has to say so twice."""
    client = ScriptedClient(say(tokenizer, "ok"))
    messages = [*HI, {"role": "assistant", "content": "The sea"}]
    await ask(client, tokenizer, messages=messages, continue_final_message=True, **more)
    assert tokenizer.decode(client.requests[0].prompt, skip_special_tokens=False).endswith("assistant\nThe sea")


async def test_a_turn_begins_unless_told_otherwise(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    for given in ({}, {"add_generation_prompt": None}, {"add_generation_prompt": True}):
        await ask(client, tokenizer, **given)
    assert {request.prompt for request in client.requests} == {tuple(chat_prompt(tokenizer, HI))}


@pytest.mark.parametrize(
    "raw", ["123456789012345678901234567890", "NaN", "-Infinity", "1e400", "1.10", "1E5", "-0", "0.5", "9" * 4400]
)
@pytest.mark.parametrize("use", ["call.arguments | tojson", "call.arguments.x"])
async def test_numbers_of_a_call_in_the_next_prompt(tmp_path: Path, raw: str, use: str) -> None:
    """The digits that the model wrote, whether the template makes JSON of the arguments or takes them apart."""
    save_tokenizer(tmp_path, MAX_MODEL_LEN)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    hf.chat_template = f"{{%- set call = messages[1].tool_calls[0].function %}}{{{{ {use} }}}}"
    tokenizer = Tokenizer(hf)
    service = make_service(ScriptedClient(say(tokenizer, "ok")), tokenizer)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": f'{{"x": {raw}}}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    async with http_client(create_app(service)) as http:
        tokens = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
    assert tokenizer.decode(tokens) == (f'{{"x": {raw}}}' if "tojson" in use else raw)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL_TEXT = 'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


async def test_tool_call_whole(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, CALL_TEXT, FinishReason.STOP))
    reply = await ask(client, tokenizer, tools=[TOOL], tool_choice="auto")
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Adding."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": [2]}'}
    prompt = tokenizer.decode(client.requests[0].prompt, skip_special_tokens=False)
    assert json.loads(prompt.split("Tools: ")[1].split("\n")[0]) == [TOOL]


async def test_tool_call_streamed(tokenizer: Tokenizer) -> None:
    """Name, id and type in the first delta only, then index and fragments."""
    client = ScriptedClient(say(tokenizer, CALL_TEXT, FinishReason.STOP))
    events = await ask(client, tokenizer, tools=[TOOL], stream=True)
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "add", "arguments": ""}
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert len(calls) > 3
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1, "b": [2]}'
    assert joined(events) == "Adding."
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}


@pytest.mark.parametrize("stream", [False, True])
async def test_tags_that_are_special_tokens(tmp_path: Path, stream: bool) -> None:
    """Special tokens are skipped, these two not while calls are read: or the call would be content."""
    save_tokenizer(tmp_path, MAX_MODEL_LEN)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    hf.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer = Tokenizer(hf)
    client = ScriptedClient(say(tokenizer, CALL_TEXT + "<|bos|>", FinishReason.STOP))
    told, untold = [await ask(client, tokenizer, stream=stream, **fields) for fields in ({"tools": [TOOL]}, {})]
    if stream:
        deltas = [event["choices"][0]["delta"] for event in told]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        found = ["".join(call.get(key, "") for call in calls) for key in ("name", "arguments")]
        texts = [joined(told), joined(untold)]
    else:
        messages = [reply["choices"][0]["message"] for reply in (told, untold)]
        found = list(messages[0]["tool_calls"][0]["function"].values())
        texts = [message["content"] for message in messages]
    assert found == ["add", '{"a": 1, "b": [2]}']
    assert texts == ["Adding.", CALL_TEXT.replace("<tool_call>", "").replace("</tool_call>", "")]


async def test_no_tools_no_calls(tokenizer: Tokenizer) -> None:
    """Text that looks like a call is text when no tools were given or their use was forbidden."""
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}):
        client = ScriptedClient(say(tokenizer, CALL_TEXT, FinishReason.STOP))
        reply = await ask(client, tokenizer, **fields)
        assert reply["choices"][0]["message"]["content"] == CALL_TEXT
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert "Tools:" not in tokenizer.decode(client.requests[0].prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(tokenizer: Tokenizer, stream: bool) -> None:
    """One entry a token, a part of a character included, with its true bytes."""
    client = ScriptedClient(say(tokenizer, "é!"))
    reply = await ask(client, tokenizer, logprobs=True, top_logprobs=1, stream=stream)
    if stream:
        found = [event["choices"][0]["logprobs"] for event in reply if event["choices"][0]["logprobs"]]
        assert joined(reply) == "é!"
    else:
        found = [reply["choices"][0]["logprobs"]]
    assert all(part["refusal"] is None for part in found)
    content = [entry for part in found for entry in part["content"]]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("�", [0xC3]), ("�", [0xA9]), ("!", [0x21])]
    assert all(entry["logprob"] == -0.5 for entry in content)
    assert content[2]["top_logprobs"] == [{"token": "!", "bytes": [0x21], "logprob": -0.5}]


async def test_token_ids(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "sea", FinishReason.STOP))
    whole = await ask(client, tokenizer, return_token_ids=True)
    tokens = [*tokenizer.encode("sea", False), end_token(tokenizer)]
    assert whole["prompt_token_ids"] == list(client.requests[0].prompt)
    assert whole["choices"][0]["token_ids"] == tokens
    events = await ask(
        ScriptedClient(say(tokenizer, "sea", FinishReason.STOP)), tokenizer, return_token_ids=True, stream=True
    )
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == tokens
    assert not any("prompt_token_ids" in event for event in events[1:])


async def test_ids_are_unique(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    replies = [await ask(client, tokenizer) for _ in range(3)]
    assert len({reply["id"] for reply in replies}) == 3
    assert len({request.request_id for request in client.requests}) == 3
