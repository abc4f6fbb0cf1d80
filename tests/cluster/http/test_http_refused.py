"""Fields of other servers: those that would change an answer are refused by name, those that would not are ignored."""

from __future__ import annotations

import pytest

from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.errors import ApiError
from kvbaton.cluster.http.protocol import ChatRequest, CompletionRequest, TokenizeChatRequest
from kvbaton.cluster.http.refused import REFUSED, check_not_refused
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import ScriptedClient, http_client, make_service, say

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
IGNORED = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prediction": {"type": "content"},
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "priority": 1,
    "request_id": "r",
    "cache_prompt": True,
    "id_slot": 0,
    "timings_per_token": True,
    "nobody_knows_this": [1],
}
ASKED = [
    *(("regex", "a+"), ("ebnf", "root ::= x"), ("json_schema", {}), ("grammar", {"type": "json", "value": {}})),
    *(("lora_path", "/l"), ("guided_regex", "a"), ("mirostat", 2), ("typical_p", 0.5), ("n_predict", 5)),
    *(("stop_regex", "a"), ("bad_words", ["a"]), ("reasoning_effort", "low"), ("truncate_prompt_tokens", 3)),
]


@pytest.mark.parametrize("name", REFUSED)
def test_each_field_names_itself_and_its_neutral_values_pass(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_not_refused({"user": "u", name: {"asked": "for"}})
    assert (caught.value.body.param, caught.value.body.code) == (name, "unsupported_parameter")
    assert caught.value.body.message.startswith(f"{name} is not supported")
    for neutral in (None, *REFUSED[name][1]):
        check_not_refused({name: neutral})


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, TokenizeChatRequest])
def test_no_field_that_is_read_is_refused(kind: type[ChatRequest]) -> None:
    """Guards the table against a field that has come to work: it would still be refused where it is not declared."""
    assert set(kind.model_fields) & set(REFUSED) <= {"best_of"}


@pytest.mark.parametrize(("name", "value"), ASKED)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
async def test_an_answer_that_would_be_another_is_refused(
    tokenizer: Tokenizer, path: str, name: str, value: object
) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    prompt: dict[str, object] = {"prompt": "Hi"} if path == TEXT else {"messages": HI}
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        response = await http.post(path, json={**prompt, name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert client.requests == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_what_changes_no_answer_is_ignored(tokenizer: Tokenizer, path: str) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        response = await http.post(path, json={"prompt": "Hi", "messages": HI, **IGNORED})
    assert response.status_code == 200, response.text
