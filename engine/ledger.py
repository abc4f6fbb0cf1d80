"""The books of one engine, in which both of its workers write: whose requests, whose blocks, what to say to whom."""

from __future__ import annotations

from collections.abc import Iterable

from kvbaton.engine.kv.block_owners import BlockAudit, BlockOwners, Holding, audit_blocks
from kvbaton.engine.legs import Legs
from kvbaton.engine.outbox import Outbox
from kvbaton.engine.step_pipeline import StepEngine, StepPipeline


class Ledger:
    """`max_tokens` bounds prompt and completion of a sample, by the model's length and by the pool: a sequence that
    outgrew the whole pool could be preempted but never computed again."""

    def __init__(self, engine: StepEngine) -> None:
        self.kv = engine.kv
        self.vocab_size = engine.vocab_size
        self.max_tokens = min(engine.max_model_len, engine.kv.num_blocks * engine.kv.block_size)
        self.legs = Legs()
        self.owners = BlockOwners()
        self.outbox = Outbox(self.max_tokens)
        self.pipeline = StepPipeline(engine)

    def audit(self, holdings: Iterable[Holding]) -> BlockAudit:
        """Every block by its owner, counted anew from `holdings` and the step on its way; walks over the pool."""
        parked = (Holding(table) for table in self.pipeline.parked())
        return audit_blocks(self.kv, self.owners, [*holdings, *parked], self.pipeline.written())
