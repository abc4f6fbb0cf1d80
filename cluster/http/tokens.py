"""`/tokenize` and `/detokenize`: text or messages to token ids as a completion would see them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.calls import check_model
from kvbaton.cluster.http.errors import bad_request
from kvbaton.cluster.http.prompts import check_token_ids, encode_text, read_chat
from kvbaton.cluster.http.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest, parse_body
from kvbaton.cluster.http.service import Service


class TokenEndpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, http: HttpRequest) -> Response:
        raw = await http.body()
        if _has_messages(raw):
            chat = parse_body(TokenizeChatRequest, raw)
            check_model(chat.model, self._service)
            prompt = await read_chat(self._service.tokenizer, self._service.model, chat)
            return self._tokens(prompt.token_ids, bool(chat.return_token_strs))
        text = parse_body(TokenizeTextRequest, raw)
        check_model(text.model, self._service)
        ids = await encode_text(self._service.tokenizer, text.prompt, text.add_special_tokens is not False)
        return self._tokens(ids, bool(text.return_token_strs))

    async def detokenize(self, http: HttpRequest) -> Response:
        body = parse_body(DetokenizeRequest, await http.body())
        check_model(body.model, self._service)
        if body.tokens:
            check_token_ids(body.tokens, self._service.model, "tokens")
        return json_response({"prompt": self._service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _tokens(self, ids: Sequence[int], with_text: bool) -> Response:
        texts = [self._service.tokenizer.token_text(token) for token in ids] if with_text else None
        limit = self._service.model.max_model_len
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})


def json_response(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _has_messages(raw: bytes) -> bool:
    """Which of the two forms a body has. Text that is no JSON is left to the parser's own words."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return "messages" in value
