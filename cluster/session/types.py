"""The session plane between an ingress and an engine: what is submitted, and the two sides' seams.

One framed msgpack TCP connection per (ingress replica, engine). Upstream: submit, abort. Downstream: one frame per
engine step that carries every output for that ingress together with the engine's load.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress


class Leg(enum.StrEnum):
    """What one engine does for a request. LOCAL: prefill and decode here, no transfer. MOVE: go on with a sample that
    decodes on the peer, with the KV that the peer sends."""

    PREFILL = "prefill"
    DECODE = "decode"
    LOCAL = "local"
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class Submit:
    """`peer` is the other engine of the pair (its KV address), None for LOCAL."""

    request: Request
    leg: Leg
    peer: PeerAddress | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Hand one decoding sample over to the engine `to`, which has a MOVE leg named (`new_id`, `new_epoch`) whose prompt
    and emitted tokens are `context_tokens`. `to` None: stop the move that goes to that leg, and decode on."""

    request_id: str
    sample: int
    to: PeerAddress | None
    new_id: str
    new_epoch: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Moved:
    """How a move ended at its source. With `moved` the sample goes on at the target, all of its tokens up to there were
    sent before; without, it goes on here, for `reason`."""

    new_id: str
    new_epoch: int
    moved: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MoveWanted:
    """The engine asks the ingress to move a request (every sample of it) to engine `to`, or wherever it likes ("")."""

    request_id: str
    to: str = ""


Notice = Moved | MoveWanted


class SubmitRefused(RuntimeError):
    """The engine does not even take a request into its inbox; the message is the reason."""


class SessionHandler(Protocol):
    """The engine's side of a session server. Called on the event loop; must not block."""

    def submit(self, session_id: int, submit: Submit) -> None:
        """Raises `SubmitRefused`."""
        ...

    def abort(self, session_id: int, request_id: str, sample: int | None) -> None:
        """Stop a request (or one sample of it) and release all it holds. Unknown ids are ignored."""
        ...

    def move(self, session_id: int, move: Move) -> None:
        """Answered by a `Moved`, unless the sample ends before."""
        ...

    def session_lost(self, session_id: int) -> None:
        """The ingress is gone: abort everything that it submitted."""
        ...


def refused_outputs(submit: Submit, message: str) -> list[TokenOutput]:
    """The outputs that end every sample of a request without a token."""
    request = submit.request
    index = len(request.emitted)
    return [
        TokenOutput(request.request_id, request.epoch, sample, index, None, finish=FinishReason.ERROR, error=message)
        for sample in request.sample_indices
    ]
