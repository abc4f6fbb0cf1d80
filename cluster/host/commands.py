"""What a worker is fed and what it stands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvbaton.cluster.session.types import Move, Submit
from kvbaton.engine.batch import Pending, ScheduledRow
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.kvtransfer.messages import Failed, Granted, Landed, Offered, Released


class StepEngine(Protocol):
    """What the step loop needs of an engine: its blocks, and a forward pass over scheduled rows. `pipelined`: a step
    may be launched before the last one was waited for."""

    kv: KVManager
    max_model_len: int
    pipelined: bool

    @property
    def vocab_size(self) -> int: ...

    def launch(self, rows: list[ScheduledRow]) -> Pending: ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Abort:
    """One request of a session, or one sample of it (`sample`), or all requests of the session (`request_id` None)."""

    session_id: int
    request_id: str | None
    sample: int | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    session_id: int
    submit: Submit


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """An ingress has one of its samples moved, or stops that."""

    session_id: int
    move: Move


@dataclass(frozen=True, slots=True)
class MoveAway:
    """An operator wants a request (None: every request) to go on elsewhere; its ingress is asked to see to it."""

    request_id: str | None
    to: str = ""


Item = Submitted | Abort | MoveOrder | MoveAway | Offered | Granted | Landed | Released | Failed
