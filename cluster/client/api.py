"""The seam between the HTTP layer and the cluster: one method that streams tokens, and its named failures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from kvbaton.engine.request import Request, TokenOutput


class ServiceError(Exception):
    """The cluster could not serve a request; `status` is the HTTP status before the first byte."""

    status = 503


class Overloaded(ServiceError):
    """Refused before any work was spent; try again after `retry_after_s`."""

    status = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoEngines(ServiceError):
    """No engine can take the request at present."""


class DeadlineExceeded(ServiceError):
    """The request took longer than it may."""


class Cancelled(ServiceError):
    """Somebody other than its reader cancelled the request."""

    status = 499


class ShuttingDown(ServiceError):
    """The endpoint goes down: the time for requests in progress is over, and no new one begins."""


class EngineLost(ServiceError):
    """The request was resumed as often as allowed and failed each time."""


class GenerationClient(Protocol):
    """What the HTTP layer needs of the cluster."""

    def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        """Stream the tokens of every sample, each sample's in order of `index` without gap or duplicate.

        A list holds what arrived together and may mix samples. The stream ends after each sample had an output with
        `finish` STOP or LENGTH. Raises `ServiceError`. Closing the iterator (aclose) aborts the request on both
        engines.
        """
        ...

    def finish_sample(self, request_id: str, sample: int) -> None:
        """One sample of several needs no more tokens (a stop string matched); outputs for it may cease."""
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request in whatever state it is: its stream raises `Cancelled`. False if it is not in progress here."""
        ...

    def ready(self) -> bool:
        """True while at least one engine can prefill and one can decode."""
        ...
