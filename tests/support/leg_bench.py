"""One kind of leg alone: a ledger on a toy engine, an agent that only writes down, and steps run by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.kv.block_owners import BlockAudit, Holding
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import Request, TokenOutput
from kvbaton.engine.step_pipeline import LandedRow
from kvbaton.kvtransfer.messages import HandoffKey, PeerAddress
from support.recording_agent import RecordingAgent
from support.toy_engine import ToyEngine

SESSION = 7
PEER = PeerAddress("peer", 1, "127.0.0.1", 1)


class Holder(Protocol):
    """A worker, or a part of one."""

    def held(self) -> Iterable[Holding]: ...


class LegBench:
    """`engine` has blocks of 4 tokens."""

    def __init__(self, num_blocks: int = 32, pipelined: bool = False) -> None:
        self.engine = ToyEngine(num_blocks)
        self.engine.pipelined = pipelined
        self.kv = self.engine.kv
        self.agent = RecordingAgent()
        self.ledger = Ledger(self.engine)

    def leg(self, request: Request, kind: LegKind) -> Leg:
        """A leg that the ledger knows, as if it had just been submitted."""
        leg = Leg(SESSION, Submit(request, kind, None if kind is LegKind.LOCAL else PEER))
        self.ledger.legs.add(leg)
        return leg

    def run(self, rows: list[ScheduledRow]) -> list[LandedRow]:
        """Run rows to their end."""
        assert self.ledger.pipeline.launch(rows) == []
        return self.ledger.pipeline.land()

    def outputs(self) -> list[TokenOutput]:
        """What went to the ingress since the last call."""
        return [output for outputs in self.ledger.outbox.take_tokens().values() for output in outputs]

    def audit(self, *holders: Holder) -> BlockAudit:
        """Every block by its owner; fails where a holder or a reason is unknown."""
        audit = self.ledger.audit([holding for holder in holders for holding in holder.held()])
        assert audit.problems == ()
        return audit

    def told(self, name: str) -> list[object]:
        """What the agent was asked under that name."""
        return [what for called, what in self.agent.calls if called == name]


def key_of(request: Request) -> HandoffKey:
    return HandoffKey(request.request_id, request.epoch)
