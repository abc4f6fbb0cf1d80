"""`/v1/completions`: the forms of a prompt, echo, log-probabilities, several prompts at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.service import SamplingDefaults
from kvbaton.engine.request import FinishReason, Request
from kvbaton.engine.text.tiny_tokenizer import IM_END
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import MODEL_ID, ScriptedClient, Step, http_client, make_service, outputs, say, sse_events

PATH = "/v1/completions"


async def ask(client: ScriptedClient, tokenizer: Tokenizer, **fields: Any) -> Any:
    async with http_client(create_app(make_service(client, tokenizer))) as http:
        response = await http.post(PATH, json={"model": MODEL_ID, **fields})
    assert response.status_code == 200, response.text
    return sse_events(response.text) if fields.get("stream") else response.json()


def joined(events: list[dict[str, Any]], choice: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == choice)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("the sea", ["the sea"]),
        (["the", "sea"], ["the", "sea"]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["the", [7]], ["the", (7,)]),
    ],
)
async def test_forms_of_a_prompt(tokenizer: Tokenizer, prompt: Any, expected: list[Any]) -> None:
    client = ScriptedClient(say(tokenizer, "ok"))
    reply = await ask(client, tokenizer, prompt=prompt)
    wanted = [tuple(tokenizer.encode(one)) if isinstance(one, str) else one for one in expected]
    assert [request.prompt for request in client.requests] == wanted
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(expected)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, wanted))
    assert reply["object"] == "text_completion"


async def test_token_limit(tokenizer: Tokenizer) -> None:
    """16 where nothing is said, as the API documents; the rest of the context for null; else what was asked."""
    client = ScriptedClient(say(tokenizer, "ok"))
    for fields in ({}, {"max_tokens": None}, {"max_tokens": 3}, {"prompt": [1] * 250}):
        await ask(client, tokenizer, **{"prompt": [1, 2], **fields})
    assert [request.sampling.max_tokens for request in client.requests] == [16, 254, 3, 6]


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        (SamplingDefaults(max_new_tokens=40), [40, 40, 3, 6]),
        (SamplingDefaults(max_new_tokens=40, max_length=5), [40, 40, 3, 6]),
        (SamplingDefaults(max_length=42), [40, 40, 3, 6]),
        (SamplingDefaults(max_length=252), [250, 250, 3, 2]),
        (SamplingDefaults(max_length=200), [198, 198, 3, 6]),
    ],
)
async def test_the_models_own_length_is_the_default(
    tokenizer: Tokenizer, defaults: SamplingDefaults, expected: list[int]
) -> None:
    """As transformers takes generation_config.json: `max_new_tokens` before `max_length`, both within the context.

    A prompt past `max_length`, which transformers refuses, is answered as if the file did not set it.
    """
    client = ScriptedClient(say(tokenizer, "ok"))
    service = make_service(client, tokenizer, defaults=defaults)
    async with http_client(create_app(service)) as http:
        for fields in ({}, {"max_tokens": None}, {"max_tokens": 3}, {"prompt": [1] * 250}):
            reply = await http.post(PATH, json={"model": MODEL_ID, "prompt": [1, 2], **fields})
            assert reply.status_code == 200, reply.text
    assert [request.sampling.max_tokens for request in client.requests] == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_run_at_once_and_keep_their_places(tokenizer: Tokenizer, stream: bool) -> None:
    """The second prompt ends before the first begins: a server that takes turns would never answer."""
    second_done = asyncio.Event()

    def script(request: Request) -> Any:
        first = request.prompt == (1,)
        if first:
            yield second_done
        for sample in request.sample_indices:
            yield outputs(request, tokenizer.encode(f"{request.prompt[0]}/{sample}", False), sample)
        if not first:
            second_done.set()

    client = ScriptedClient(script)
    async with asyncio.timeout(20):
        reply = await ask(client, tokenizer, prompt=[[1], [2]], n=2, stream=stream)
    if stream:
        texts = [joined(reply, choice) for choice in range(4)]
    else:
        texts = [choice["text"] for choice in reply["choices"]]
    assert texts == ["1/0", "1/1", "2/0", "2/1"]
    assert sorted(client.closed) == sorted(request.request_id for request in client.requests)
    assert client.aborted == []
    assert client.requests[0].sampling.seed != client.requests[1].sampling.seed


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(tokenizer: Tokenizer, stream: bool) -> None:
    client = ScriptedClient(say(tokenizer, " answers"))
    reply = await ask(client, tokenizer, prompt=["the sea", "é"], n=2, echo=True, stream=stream)
    texts = [joined(reply, i) for i in range(4)] if stream else [c["text"] for c in reply["choices"]]
    assert texts == ["the sea answers"] * 2 + ["é answers"] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(tokenizer: Tokenizer, stream: bool) -> None:
    """Four lists of one length; offsets are places in the text; the first token has no log-probability."""
    client = ScriptedClient(say(tokenizer, "é!", FinishReason.STOP))
    reply = await ask(client, tokenizer, prompt="Hi", echo=True, logprobs=1, stream=stream)
    assert client.requests[0].sampling.prompt_logprobs == 1
    parts = [event["choices"][0]["logprobs"] for event in reply] if stream else [reply["choices"][0]["logprobs"]]
    lists = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    assert lists["tokens"] == ["<|bos|>", "H", "i", "bytes:\\xc3", "bytes:\\xa9", "!", "<|im_end|>"]
    assert lists["text_offset"] == [0, 0, 1, 2, 3, 3, 4]
    assert lists["token_logprobs"] == [None] + [-0.5] * 6
    assert lists["top_logprobs"] == [None, *({token: -0.5} for token in lists["tokens"][1:])]


def sentencepiece() -> Tokenizer:
    """As Llama 2: a space before the first word that the text does not have, and bytes for what is no piece."""
    words = ["▁", "▁the", "▁sea", "t", "h", "e", "s", "a", IM_END]
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    rust = RustTokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.add_special_tokens(["<s>", IM_END])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust))


@pytest.mark.parametrize("prompt", ["the sea", " the", "aé the 😀😁a", "é<s>the", "sea "])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_are_places_in_the_text(prompt: str, as_ids: bool, stream: bool) -> None:
    """Whether a space before the first word is the tokenizer's own; characters of several tokens; special tokens."""
    tokenizer = sentencepiece()
    client = ScriptedClient(say(tokenizer, "é the😀sea"))
    given = tokenizer.encode(prompt) if as_ids else prompt
    reply = await ask(client, tokenizer, prompt=given, echo=True, logprobs=0, stream=stream)
    parts = [event["choices"][0]["logprobs"] for event in reply] if stream else [reply["choices"][0]["logprobs"]]
    text = joined(reply) if stream else reply["choices"][0]["text"]
    found = [pair for part in parts for pair in zip(part["tokens"], part["text_offset"], strict=True)]
    nexts = [place for _, place in found[1:]]
    shown = [
        (token, text[place : place + len(token)])
        for (token, place), after in zip(found, nexts, strict=False)
        if token[0] not in "<b" and place < after
    ]
    assert len(shown) > 5
    for number, (token, piece) in enumerate(shown):
        assert token == piece or (number == 0 and token.strip() == piece[: len(token.strip())])
    assert [place for _, place in found] == sorted(place for _, place in found)
    assert found[0] == ("<s>", 0)
    assert found[1][1] == 0


async def test_scores_of_a_prompt_alone(tokenizer: Tokenizer) -> None:
    """echo with max_tokens 0: the engine must make one token; nobody sees or pays for it."""
    client = ScriptedClient(say(tokenizer, "x"))
    reply = await ask(client, tokenizer, prompt="Hi", echo=True, max_tokens=0, logprobs=0)
    assert client.requests[0].sampling.max_tokens == 1
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "H", "i"]
    assert reply["usage"]["completion_tokens"] == 0


async def test_impossible_logprobs_are_numbers(tokenizer: Tokenizer) -> None:
    """Minus infinity is no JSON."""

    def script(request: Request) -> list[Step]:
        (only,) = outputs(request, [70])
        never = type(only.logprobs)(float("-inf"), ((71, float("-inf")),))  # type: ignore[misc]
        return [[type(only)(**{**{s: getattr(only, s) for s in only.__slots__}, "logprobs": never})]]

    reply = await ask(ScriptedClient(script), tokenizer, prompt="Hi", logprobs=1)
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


async def test_token_ids(tokenizer: Tokenizer) -> None:
    whole = await ask(ScriptedClient(say(tokenizer, "sea")), tokenizer, prompt=[[5], [6, 7]], return_token_ids=True)
    tokens = tokenizer.encode("sea", False)
    assert [(c["prompt_token_ids"], c["token_ids"]) for c in whole["choices"]] == [([5], tokens), ([6, 7], tokens)]
    events = await ask(
        ScriptedClient(say(tokenizer, "sea")), tokenizer, prompt=[[5], [6, 7]], return_token_ids=True, stream=True
    )
    for choice, prompt in ((0, [5]), (1, [6, 7])):
        own = [c for event in events for c in event["choices"] if c["index"] == choice]
        assert [c["prompt_token_ids"] for c in own if "prompt_token_ids" in c] == [prompt]
        assert [token for c in own for token in c["token_ids"]] == tokens


@pytest.mark.parametrize(
    ("stop", "include", "text", "tokens"),
    [
        (["o w"], False, "hell", 7),
        (["o w"], True, "hello w", 7),
        ("nowhere", False, "hello world", 11),
        (["ld", "lo"], False, "hel", 5),
        (["h"], False, "", 1),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(
    tokenizer: Tokenizer, stop: Any, include: bool, text: str, tokens: int, stream: bool
) -> None:
    """Over the border of tokens: cut off, counted up to the token of the match, and ended on the engine."""

    def script(request: Request) -> list[Step]:
        letters = [tokenizer.encode(letter, False)[0] for letter in "hello world"]
        return [[one] for one in outputs(request, letters)]

    client = ScriptedClient(script)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = await ask(
        client, tokenizer, prompt="Hi", stop=stop, include_stop_str_in_output=include, stream=stream, **options
    )
    usage = reply[-1]["usage"] if stream else reply["usage"]
    choices = [c for event in reply for c in event["choices"]] if stream else reply["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert usage["completion_tokens"] == tokens
    matched = stop != "nowhere"
    assert choices[-1]["finish_reason"] == ("stop" if matched else "length")
    assert client.aborted == ([client.requests[0].request_id] if matched else [])
    assert len(client.closed) == 1


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "ab"), (2, "ab"), (3, "abab")])
async def test_min_tokens_holds_for_stop_strings(tokenizer: Tokenizer, min_tokens: int, text: str) -> None:
    """Tokens a, b, a, b, a: a match within the first min_tokens does not count."""

    def script(request: Request) -> list[Step]:
        letters = [tokenizer.encode(letter, False)[0] for letter in "ababa"]
        return [[one] for one in outputs(request, letters)]

    reply = await ask(ScriptedClient(script), tokenizer, prompt="Hi", stop="a", min_tokens=min_tokens)
    assert reply["choices"][0]["text"] == text
    assert reply["choices"][0]["finish_reason"] == "stop"


async def test_a_stop_string_ends_one_sample_and_not_its_siblings(tokenizer: Tokenizer) -> None:
    """Late outputs of the ended sample are dropped; the stream goes on until the others are complete."""

    def script(request: Request) -> list[Step]:
        rows = [outputs(request, tokenizer.encode(text, False), i) for i, text in enumerate(("1.2", "345"))]
        return [[a, b] for a, b in zip(*rows, strict=True)]

    client = ScriptedClient(script)
    reply = await ask(client, tokenizer, prompt="Hi", n=2, stop=["."])
    assert [(c["text"], c["finish_reason"]) for c in reply["choices"]] == [("1", "stop"), ("345", "length")]
    request_id = client.requests[0].request_id
    assert client.finished_samples == [(request_id, 0)]
    assert client.closed == [request_id]
    assert reply["usage"]["completion_tokens"] == 5


async def test_special_tokens_are_shown_where_asked(tokenizer: Tokenizer) -> None:
    bos = tokenizer.encode("")[0]
    client = ScriptedClient(lambda request: [outputs(request, [70, bos, 71])])
    plain = tokenizer.decode([70, 71])
    assert (await ask(client, tokenizer, prompt="Hi"))["choices"][0]["text"] == plain
    shown = await ask(client, tokenizer, prompt="Hi", skip_special_tokens=False)
    assert shown["choices"][0]["text"] == tokenizer.decode([70, bos, 71], skip_special_tokens=False)


async def test_many_characters_are_tokenized_off_the_loop_alike(tokenizer: Tokenizer) -> None:
    """Guards both ways of reading prompts, by their sum: many short ones weigh as much as one that is long."""
    client = ScriptedClient(say(tokenizer, "ok"))
    prompts = ["the sea, it never sleeps, " * 20] * 60
    await ask(client, tokenizer, prompt=[*prompts, [5]], max_tokens=1)
    wanted = tuple(tokenizer.encode(prompts[0]))
    assert sorted({request.prompt for request in client.requests}) == sorted({wanted, (5,)})
    assert len(client.requests) == 61
