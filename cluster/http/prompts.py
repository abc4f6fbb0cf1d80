"""Prompts: the four forms of `prompt` and the messages of a chat become token ids, checked against the model."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any, TypeVar

from kvbaton.cluster.http.errors import ApiError, bad_request, unsupported
from kvbaton.cluster.http.protocol import ChatFields, ChatMessage, FunctionCall, Tool
from kvbaton.cluster.http.service import ModelCard
from kvbaton.engine.text.tokenizer import Tokenizer

Result = TypeVar("Result")

# Above this many characters a thread tokenizes (the Rust tokenizer lets go of the GIL), so that one long prompt does
# not hold up the tokens of every other stream.
INLINE_CHARS = 20_000
_INT_DIGITS = 4000  # Python converts no more than 4,300
_MESSAGE_CHARS = 50  # what the template's work on one message weighs in characters
# Arguments of the tokenizer's own method: a client must not set them, least of all the template.
_RESERVED_OPTIONS = frozenset(
    [
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
    ]
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is None where the client sent token ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


def split_prompts(value: Any, max_prompts: int) -> list[str | list[int]]:
    """The prompts in `value`: a string, token ids, or a list of either. Raises `ApiError`."""
    if isinstance(value, str):
        prompts: list[str | list[int]] = [value]
    elif value == []:
        raise bad_request("prompt is empty", "prompt")
    elif not isinstance(value, list):
        raise bad_request(
            "prompt must be a string, a list of strings, token ids, or a list of token-id lists", "prompt"
        )
    elif _is_token_ids(value):
        prompts = [value]
    else:
        prompts = [_one_of_many(item, index) for index, item in enumerate(value)]
    if len(prompts) > max_prompts:
        raise bad_request(f"{len(prompts)} prompts in one call; at most {max_prompts} are allowed", "prompt")
    if not all(prompts):
        raise bad_request("prompt is empty", "prompt")
    return prompts


def _one_of_many(item: Any, index: int) -> str | list[int]:
    if isinstance(item, str) or (isinstance(item, list) and _is_token_ids(item)):
        return item
    raise bad_request(f"prompt[{index}] is neither a string nor a list of token ids", f"prompt[{index}]")


def _is_token_ids(value: list[Any]) -> bool:
    return all(type(token) is int for token in value)


async def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return await _off_loop_if_long(len(text), lambda: tokenizer.encode(text, add_special_tokens))


async def _off_loop_if_long(chars: int, work: Callable[[], Result]) -> Result:
    return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)


async def read_prompts(
    tokenizer: Tokenizer, model: ModelCard, prompts: Sequence[str | list[int]], add_special_tokens: bool
) -> list[Prompt]:
    """The prompts of `/v1/completions`. Raises `ApiError`."""

    def read(prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(tuple(tokenizer.encode(prompt, add_special_tokens)), prompt)
        return Prompt(tuple(prompt))

    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    result = await _off_loop_if_long(chars, lambda: [read(prompt) for prompt in prompts])
    for prompt in result:
        check_token_ids(prompt.token_ids, model, "prompt")
    return result


def check_token_ids(token_ids: Sequence[int], model: ModelCard, param: str) -> None:
    if not token_ids:
        raise bad_request(f"{param} is empty", param)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise bad_request(f"token id {wrong} is not in the vocabulary [0, {model.vocab_size})", param)


async def read_chat(tokenizer: Tokenizer, model: ModelCard, body: ChatFields) -> Prompt:
    """The prompt that the model's template makes of a conversation. Raises `ApiError` or `InvalidRequest`."""
    options = template_options(body)
    numbers = ExactNumbers()
    messages = [template_message(message, index, numbers) for index, message in enumerate(body.messages)]
    tools = template_tools(body.tools) if uses_tools(body) else None
    given = body.add_generation_prompt
    begin_answer = not body.continue_final_message if given is None else given

    def read() -> Prompt:
        text = numbers.restore(tokenizer.render_chat(messages, tools, begin_answer, options))
        return Prompt(tuple(tokenizer.encode(text, bool(body.add_special_tokens))), text)

    chars = sum(_MESSAGE_CHARS + len(message["content"]) for message in messages)
    prompt = await _off_loop_if_long(chars, read)
    check_token_ids(prompt.token_ids, model, "messages")
    return prompt


def template_options(body: ChatFields) -> dict[str, Any]:
    options = dict(body.chat_template_kwargs or {})
    for name in options:
        if name in _RESERVED_OPTIONS:
            raise bad_request(f"chat_template_kwargs must not set {name!r}", "chat_template_kwargs")
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        options["continue_final_message"] = True
    return options


def uses_tools(body: ChatFields) -> bool:
    """Whether the model is told of tools. Raises `ApiError` for a choice that sampling would have to enforce."""
    if body.tool_choice not in (None, "none", "auto"):
        shown = body.tool_choice if isinstance(body.tool_choice, str) else "a named tool"
        raise unsupported("tool_choice", f" with {shown[:40]}: only 'auto' and 'none' are")
    return bool(body.tools) and body.tool_choice != "none"


def template_tools(tools: Sequence[Tool] | None) -> list[Mapping[str, Any]]:
    return [tool.model_dump(exclude_unset=True) for tool in tools or ()]


class ExactNumbers:
    """Numbers in arguments of tool calls, of which templates make JSON again: whoever wrote 0.10, NaN or 1e400 finds it
    as it was. What Python would write otherwise is an integer of no meaning for the template, and replaced behind it.
    """

    def __init__(self) -> None:
        self._written: dict[str, str] = {}
        self._decoder = JSONDecoder(
            parse_int=self._int, parse_float=self._float, parse_constant=self._stand_in, strict=False
        )

    def loads(self, text: str) -> Any:
        """The value of JSON text. Raises `ValueError` or `RecursionError`."""
        return self._decoder.decode(text)

    def restore(self, rendered: str) -> str:
        """The text that a template made, with the numbers as they were written."""
        if not self._written:
            return rendered
        return re.sub(r"\b\d{39}\b", lambda found: self._written.get(found[0], found[0]), rendered)

    def _int(self, text: str) -> int:
        exact = len(text) <= _INT_DIGITS and text != "-0"
        return int(text) if exact else self._stand_in(text)

    def _float(self, text: str) -> float:
        value = float(text)
        return value if repr(value) == text else self._stand_in(text)

    def _stand_in(self, text: str) -> int:
        number = secrets.randbits(128) | 1 << 128  # of 39 digits, and nowhere else in the prompt
        self._written[str(number)] = text
        return number


def template_message(message: ChatMessage, index: int, numbers: ExactNumbers) -> dict[str, Any]:
    """A message as templates expect it: plain text, arguments of tool calls as an object, no `developer` role."""
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": message_text(message.content, index)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _function(call.function, numbers)}
            for call in message.tool_calls
        ]
    return result


def _function(call: FunctionCall, numbers: ExactNumbers) -> dict[str, Any]:
    """Clients send arguments as JSON text. Text that is not JSON (a model wrote it) is passed on as it is."""
    arguments: Any = call.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = numbers.loads(arguments)
        except (ValueError, RecursionError):
            return {"name": call.name, "arguments": arguments}
    return {"name": call.name, "arguments": arguments}


def message_text(content: Any, index: int) -> str:
    """Text of a message: a string, null, or a list of text parts, joined by line breaks. Raises `ApiError`."""
    where = f"messages[{index}].content"
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string, null or a list of text parts", where)
    return "\n".join(_part_text(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str):
            return text
    elif isinstance(kind, str):
        raise ApiError(400, f"{where}: parts of type {kind[:40]!r} are not supported, only text", where)
    raise bad_request(f"{where} must be a text part", where)
