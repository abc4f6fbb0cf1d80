"""The endpoints that generate nothing: what is served and how it is, token ids and text, the cancelling of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.call import cancel_call
from kvbaton.cluster.http.errors import ApiError, ErrorBody, bad_request
from kvbaton.cluster.http.metrics import CONTENT_TYPE
from kvbaton.cluster.http.prompts import check_token_ids, encode_text, read_chat
from kvbaton.cluster.http.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest, parse_body
from kvbaton.cluster.http.service import ModelCard, Service

MAX_CALL_ID_CHARS = 128


class ServiceEndpoints:
    """Models, health, readiness, version, metrics; tokenizing; cancelling."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [model_json(self._service.model)]})

    async def model(self, http: HttpRequest) -> Response:
        self._service.check_model(http.path_params["model"])
        return json_response(model_json(self._service.model))

    async def health(self) -> Response:
        """This process answers; says nothing of engines."""
        return json_response({"status": "ok"})

    async def ping(self) -> Response:
        """As `health`, without a body, for load balancers that ask here."""
        return Response(status_code=200)

    async def ready(self) -> Response:
        if self._service.client.ready():
            return json_response({"status": "ready"})
        return ErrorBody(503, "no engines are ready yet", code="not_ready").response()

    async def version(self) -> Response:
        return json_response({"version": self._service.version})

    async def metrics(self) -> Response:
        return Response(self._service.metrics.render(), media_type=CONTENT_TYPE)

    async def tokenize(self, http: HttpRequest) -> Response:
        """Text or messages to the token ids that a completion would see."""
        raw = await http.body()
        if _has_messages(raw):
            chat = parse_body(TokenizeChatRequest, raw)
            self._service.check_model(chat.model)
            chat.check_supported()
            prompt = await read_chat(self._service.tokenizer, self._service.model, chat)
            return self._tokens(prompt.token_ids, bool(chat.return_token_strs))
        text = parse_body(TokenizeTextRequest, raw)
        self._service.check_model(text.model)
        ids = await encode_text(self._service.tokenizer, text.prompt, text.add_special_tokens is not False)
        return self._tokens(ids, bool(text.return_token_strs))

    def _tokens(self, ids: Sequence[int], with_text: bool) -> Response:
        texts = [self._service.tokenizer.token_text(token) for token in ids] if with_text else None
        limit = self._service.model.max_model_len
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})

    async def detokenize(self, http: HttpRequest) -> Response:
        body = parse_body(DetokenizeRequest, await http.body())
        self._service.check_model(body.model)
        if body.tokens:
            check_token_ids(body.tokens, self._service.model, "tokens")
        return json_response({"prompt": self._service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def cancel(self, http: HttpRequest) -> Response:
        """End a call that somebody else is reading, by the id that its answer carries (`chatcmpl-...`, `cmpl-...`).

        A call lives in one replica of the ingress: 200 where it was cancelled here, 202 where the other replicas have
        been told, else 404.
        """
        call_id = http.path_params["call_id"]
        if len(call_id) > MAX_CALL_ID_CHARS:
            raise bad_request("that is no id of a call", "id")
        if cancel_call(self._service.client, call_id, self._service.limits.max_prompts):
            return json_response({"id": call_id, "object": "request.cancelled", "cancelled": True})
        if self._service.cancel_elsewhere is not None:
            if not await self._service.cancel_elsewhere(call_id):
                raise ApiError(503, "the other replicas cannot be told at present", code="service_unavailable")
            told = json_response({"id": call_id, "object": "request.cancelled", "cancelled": None})
            told.status_code = 202
            return told
        raise ApiError(404, f"no call {call_id!r} is in progress", code="not_found")


def json_response(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def model_json(model: ModelCard) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "kvbaton",
        "root": model.id,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _has_messages(raw: bytes) -> bool:
    """Which of the two forms a body has. Text that is not JSON is left to the parser, whose message is better."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return "messages" in value
