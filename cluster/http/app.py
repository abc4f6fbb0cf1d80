"""The whole HTTP surface as one ASGI application. It keeps no global state: one `Service`, one application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.answer import TokenTexts
from kvbaton.cluster.http.chat import ChatEndpoint
from kvbaton.cluster.http.completions import CompletionEndpoint
from kvbaton.cluster.http.endpoints import ServiceEndpoints
from kvbaton.cluster.http.errors import ApiError, ErrorBody, from_invalid_request
from kvbaton.cluster.http.gate import Front, Gate
from kvbaton.cluster.http.service import Service
from kvbaton.engine.request import InvalidRequest


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="kvbaton", version=service.version, openapi_url=None, redirect_slashes=False)
    _add_routes(app, service)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(InvalidRequest, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost.
    app.add_middleware(Gate, api_keys=service.api_keys, max_body_bytes=service.limits.max_body_bytes)
    app.add_middleware(Front, metrics=service.metrics, new_id=service.new_id)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    texts = TokenTexts(service.tokenizer)
    others = ServiceEndpoints(service)
    routes: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
        ("POST", "/v1/chat/completions", ChatEndpoint(service, texts).create),
        ("POST", "/v1/completions", CompletionEndpoint(service, texts).create),
        ("DELETE", "/v1/requests/{call_id}", others.cancel),
        ("POST", "/tokenize", others.tokenize),
        ("POST", "/detokenize", others.detokenize),
        ("POST", "/v1/tokenize", others.tokenize),
        ("POST", "/v1/detokenize", others.detokenize),
        ("GET", "/v1/models", others.models),
        ("GET", "/v1/models/{model:path}", others.model),
        ("GET", "/health", others.health),
        ("GET", "/ping", others.ping),
        ("POST", "/ping", others.ping),
        ("GET", "/ready", others.ready),
        ("GET", "/version", others.version),
        ("GET", "/metrics", others.metrics),
    )
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    return error.body.response() if isinstance(error, ApiError) else _unexpected(error)


async def _invalid_request(http: HttpRequest, error: Exception) -> Response:
    return from_invalid_request(error).response() if isinstance(error, InvalidRequest) else _unexpected(error)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """Starlette's own refusals: no such route, or not with this method."""
    if not isinstance(error, HTTPException):
        return _unexpected(error)
    if error.status_code == 404:
        body = ErrorBody(404, f"no such route: {http.method} {http.url.path[:200]}", code="not_found")
    elif error.status_code == 405:
        body = ErrorBody(405, f"{http.url.path[:200]} does not answer {http.method}", code="method_not_allowed")
    else:
        body = ErrorBody(error.status_code, str(error.detail))
    response = body.response()
    response.headers.update(error.headers or {})
    return response


def _unexpected(error: Exception) -> Response:
    """Starlette hands each handler the type that it was added for; anything else goes to the outermost layer."""
    raise error
