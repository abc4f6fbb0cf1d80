"""What is served and how it is: models, health, readiness, version, metrics."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.http.calls import check_model
from kvbaton.cluster.http.errors import ErrorBody
from kvbaton.cluster.http.metrics import CONTENT_TYPE
from kvbaton.cluster.http.service import ModelCard, Service
from kvbaton.cluster.http.tokens import json_response


class StatusEndpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [model_json(self._service.model)]})

    async def model(self, http: HttpRequest) -> Response:
        check_model(http.path_params["model"], self._service)
        return json_response(model_json(self._service.model))

    async def health(self) -> Response:
        """This process answers; says nothing of engines."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        if self._service.client.ready():
            return json_response({"status": "ready"})
        return ErrorBody(503, "no engines are ready yet", code="not_ready").response()

    async def version(self) -> Response:
        return json_response({"version": self._service.version})

    async def metrics(self) -> Response:
        text = self._service.metrics.render() + self._service.extra_metrics()
        return Response(text, media_type=CONTENT_TYPE)


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
