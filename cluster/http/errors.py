"""Errors as clients see them: an HTTP status and the body `{"error": {message, type, param, code}}`.

A message says what the client can change, never a path, a host or a traceback of this service. Routes raise `ApiError`;
`send_error` is for the ASGI layers around and below them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Message, Send

from kvbaton.cluster.client.api import Overloaded, ServiceError
from kvbaton.engine.request import InvalidRequest

# Names that pydantic adds to a location for the branch of a union; they name no field of the client's JSON.
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list[str]", "list[int]", "dict[str,any]"})
MAX_MESSAGE_CHARS = 1000  # a message may quote what the client sent
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The four fields of an error; `status` decides the HTTP status before the first byte."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def json(self) -> bytes:
        fields = {
            "message": self.message[:MAX_MESSAGE_CHARS],
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": fields})

    def headers(self) -> dict[str, str]:
        """Whole seconds, at least one: `Retry-After: 0` would be a tight loop in some clients."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}

    def response(self) -> Response:
        return Response(self.json(), self.status, self.headers(), media_type="application/json")


class ApiError(Exception):
    """A request refused by the HTTP layer itself."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.body = ErrorBody(status, message, param, code)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def unsupported(param: str, hint: str = "") -> ApiError:
    """A field that the client set and that would silently not be honoured."""
    return ApiError(400, f"{param} is not supported{hint}", param, "unsupported_parameter")


INTERNAL_ERROR = ErrorBody(500, "internal error", code="internal_error")


def error_start(error: ErrorBody, close: bool = False) -> Message:
    """`close`: what is left of the body will not be read, so the connection cannot serve another call."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(error.json())).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
    if close:
        headers.append((b"connection", b"close"))
    return {"type": "http.response.start", "status": error.status, "headers": headers}


async def send_error(send: Send, error: ErrorBody) -> None:
    await send(error_start(error))
    await send({"type": "http.response.body", "body": error.json()})


def from_invalid_request(error: InvalidRequest) -> ErrorBody:
    return ErrorBody(400, str(error), error.param)


def from_service_error(error: ServiceError) -> ErrorBody:
    if isinstance(error, Overloaded):
        return ErrorBody(error.status, str(error), code="overloaded", retry_after_s=error.retry_after_s)
    return ErrorBody(error.status, str(error), code="service_unavailable")


def from_validation_error(error: ValidationError) -> ErrorBody:
    """The first thing wrong with a body, named as the client wrote it: `messages[0].role`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ErrorBody(400, f"the body is not valid JSON: {_json_detail(first['msg'])}", code="invalid_json")
    param = _field_path(first["loc"])
    where = f"{param}: " if param else ""
    return ErrorBody(400, f"{where}{first['msg']}", param or None)


def _json_detail(message: str) -> str:
    return message.removeprefix("Invalid JSON: ")


def _field_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_BRANCHES:
            path += f".{part}" if path else part
    return path
