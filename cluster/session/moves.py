"""How moves travel: the ingress's MOVE upstream, the engine's MOVED and MOVE_WANTED downstream."""

from __future__ import annotations

from typing import Any

from kvbaton.cluster.session.fields import WireError, index_below, natural, sized, text
from kvbaton.cluster.session.requests import MAX_ID_CHARS, decode_peer, peer_fields
from kvbaton.cluster.session.types import Move, Moved, MoveWanted
from kvbaton.engine.request import MAX_SAMPLES

MAX_REASON_CHARS = 1024


def move_fields(move: Move) -> list[object]:
    return [
        move.request_id,
        move.sample,
        None if move.to is None else peer_fields(move.to),
        move.new_id,
        move.new_epoch,
        move.context_tokens,
    ]


def decode_move(fields: list[Any]) -> Move:
    request_id, sample, to, new_id, new_epoch, context_tokens = sized("move", fields, 6)
    return Move(
        text("request id", request_id, MAX_ID_CHARS),
        index_below("sample", sample, MAX_SAMPLES),
        None if to is None else decode_peer(to),
        text("new id", new_id, MAX_ID_CHARS),
        natural("new epoch", new_epoch),
        natural("context tokens", context_tokens),
    )


def moved_fields(moved: Moved) -> list[object]:
    return [moved.new_id, moved.new_epoch, moved.moved, moved.reason[:MAX_REASON_CHARS]]


def decode_moved(fields: list[Any]) -> Moved:
    new_id, new_epoch, moved, reason = sized("moved", fields, 4)
    if type(moved) is not bool:
        raise WireError("moved must be true or false")
    return Moved(
        text("new id", new_id, MAX_ID_CHARS),
        natural("new epoch", new_epoch),
        moved,
        text("reason", reason, MAX_REASON_CHARS),
    )


def wanted_fields(wanted: MoveWanted) -> list[object]:
    return [wanted.request_id, wanted.to]


def decode_wanted(fields: list[Any]) -> MoveWanted:
    request_id, to = sized("move wanted", fields, 2)
    return MoveWanted(text("request id", request_id, MAX_ID_CHARS), text("to", to, MAX_ID_CHARS))
