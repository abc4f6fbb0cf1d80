"""`DELETE /v1/requests/{id}`: end a call that somebody else is reading; and how long a call says that it may take.

The id is the one that the answer carries (`chatcmpl-...`, `cmpl-...`). A call lives in one replica of the ingress:
where it is not here, the others are told, and the reply says 202.
"""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kvbaton.cluster.client.api import GenerationClient
from kvbaton.cluster.http.calls import request_name
from kvbaton.cluster.http.errors import ApiError, bad_request
from kvbaton.cluster.http.protocol import GenerationFields
from kvbaton.cluster.http.service import Service
from kvbaton.cluster.http.tokens import json_response

TIMEOUT_HEADER = "x-request-timeout"
MAX_ID_CHARS = 128


class CancelEndpoint:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def cancel(self, http: HttpRequest) -> Response:
        """200 where the call was cancelled here, 202 where another replica may have it, else 404."""
        call_id = http.path_params["call_id"]
        if len(call_id) > MAX_ID_CHARS:
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


def cancel_call(client: GenerationClient, call_id: str, max_prompts: int) -> bool:
    """Cancel every prompt of a call that is in progress here; False if there was none."""
    return sum(client.cancel(request_name(call_id, prompt)) for prompt in range(max_prompts)) > 0


def time_limit_s(http: HttpRequest, body: GenerationFields) -> float | None:
    """The field `timeout`, or the header, in seconds; None where the client sets no limit."""
    if body.timeout is not None:
        return body.timeout
    header = http.headers.get(TIMEOUT_HEADER)
    if header is None:
        return None
    try:
        return float(header)
    except ValueError:
        raise bad_request(f"{TIMEOUT_HEADER} must be a number of seconds, got {header[:40]!r}", "timeout") from None
