"""The JSON that clients send, as pydantic models. Unknown fields are ignored, except those that ask for something
that would silently not be done: `refused.py` lists them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvbaton.cluster.http.errors import ApiError, from_validation_error, unsupported
from kvbaton.cluster.http.refused import check_not_refused


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(BaseModel):
    type: str


class GenerationFields(BaseModel):
    """What chat and plain completions have in common. None means the default everywhere."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    min_tokens: int | None = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    return_token_ids: bool | None = False
    response_format: ResponseFormat | None = None
    cache_salt: str | None = None
    timeout: float | None = None

    def check_supported(self) -> None:
        """Raise `ApiError` for a field that could not be honoured."""
        check_not_refused(self.model_extra or {})
        if self.response_format is not None and self.response_format.type != "text":
            raise unsupported("response_format", f" with type {self.response_format.type[:40]!r}: only 'text' is")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", "stream_options")


class CompletionRequest(GenerationFields):
    """`/v1/completions`. `prompt` is checked by hand: its four forms deserve clearer errors than a union gives."""

    prompt: Any = None
    echo: bool | None = False
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    max_tokens: int | None = 16
    add_special_tokens: bool | None = True


class FunctionCall(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: FunctionSpec


class ChatFields(GenerationFields):
    """What turns messages into a prompt; `/tokenize` takes the same."""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool | None = None  # true, unless the final message is continued
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatFields):
    """`/v1/chat/completions`."""

    logprobs: bool | None = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = True
    echo: bool | None = False


class TokenizeTextRequest(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatFields):
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    tokens: list[int]
    model: str | None = None


Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Check a request body. Raises `ApiError` naming the first field that is wrong."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        body = from_validation_error(error)
        raise ApiError(body.status, body.message, body.param, body.code) from None
