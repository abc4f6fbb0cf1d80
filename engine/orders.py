"""What ingresses, peers and operators have an engine do, and what it says of it besides tokens. Plain values.

A request becomes one leg at each engine that works on it:

    PREFILL     compute the prompt, draw the first tokens, hand the KV to `peer`
    DECODE      take the KV from `peer`, decode
    LOCAL       both here, no transfer
    MIGRATION   go on with a sample that decodes at `peer`, with the KV that it sends
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import msgspec

from kvbaton.engine.request import (
    MAX_ERROR_CHARS,
    ErrorCause,
    FinishReason,
    Natural,
    Request,
    RequestId,
    SampleIndex,
    TokenOutput,
)
from kvbaton.kvtransfer.messages import HandoffKey, PeerAddress


class LegKind(enum.StrEnum):
    """What one engine does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    LOCAL = "local"
    MIGRATION = "migration"


@dataclass(frozen=True, slots=True)
class Submit:
    """`peer` is the other engine of the pair (its KV address), None for LOCAL."""

    request: Request
    kind: LegKind
    peer: PeerAddress | None = None

    def refused(self, message: str, cause: ErrorCause | None = None) -> list[TokenOutput]:
        """The outputs that end every sample of the request without a token."""
        request = self.request
        name, epoch, index = request.request_id, request.epoch, len(request.emitted)
        return [
            TokenOutput(name, epoch, sample, index, None, finish=FinishReason.ERROR, error=message, cause=cause)
            for sample in request.sample_indices
        ]


class Migrate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Hand one decoding sample over to the engine `to`, which has a MIGRATION leg named (`new_id`, `new_epoch`) whose
    prompt and emitted tokens are `context_tokens`. `to` None: stop the migration to that leg, and decode on."""

    request_id: RequestId
    sample: SampleIndex
    to: PeerAddress | None
    new_id: RequestId
    new_epoch: Natural
    context_tokens: Natural

    @property
    def key(self) -> HandoffKey:
        """The name of the target's leg, and of the hand-off that brings the sample there."""
        return HandoffKey(self.new_id, self.new_epoch)


class Migrated(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a migration ended at its source. `refusal` None: the sample goes on at the target, and all of its tokens up
    to there were sent before. Else it goes on here, and this says why."""

    new_id: RequestId
    new_epoch: Natural
    refusal: Annotated[str, msgspec.Meta(max_length=MAX_ERROR_CHARS)] | None


class MigrationWanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The engine asks the ingress to migrate a request (every sample of it) to engine `to`, None: wherever it likes."""

    request_id: RequestId
    to: RequestId | None = None


Notice = Migrated | MigrationWanted


@dataclass(frozen=True, slots=True)
class Submitted:
    """A session has a request for this engine."""

    session_id: int
    submit: Submit


@dataclass(frozen=True, slots=True)
class Abort:
    """One request of a session, or one sample of it (`sample`), or all requests of the session (`request_id` None)."""

    session_id: int
    request_id: str | None
    sample: int | None = None


@dataclass(frozen=True, slots=True)
class MigrationOrdered:
    """An ingress has one of its samples migrated, or calls that off."""

    session_id: int
    order: Migrate


@dataclass(frozen=True, slots=True)
class Evacuate:
    """An operator wants a request (None: every request) to go on elsewhere; its ingress is asked to see to it."""

    request_id: str | None
    to: str | None = None


Order = Submitted | Abort | MigrationOrdered | Evacuate
