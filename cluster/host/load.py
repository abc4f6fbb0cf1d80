"""An engine's numbers at the end of a step, for routers and metrics. Cheap enough for every step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from kvbaton.engine.kv.block_owners import BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import BlockCounts
from kvbaton.engine.sequence import Sequence
from kvbaton.kvtransfer.messages import HandoffCounts
from kvbaton.prefill_worker.queue import PrefillQueue
from kvbaton.router.engine_info import EngineLoad


def engine_load(
    counts: BlockCounts,
    owners: BlockOwners,
    queue: PrefillQueue,
    running: Seq[Sequence],
    landings: int,
    handoffs: HandoffCounts,
    step_s: float,
) -> EngineLoad:
    """`landings` are the hand-offs that wait for room."""
    return EngineLoad(
        waiting_requests=len(queue) + landings,
        running_requests=len(running),
        queued_prefill_tokens=queue.uncomputed_tokens(),
        running_context_tokens=sum(len(seq.tokens) for seq in running),
        free_blocks=counts.free,
        held_blocks=counts.held,
        cached_blocks=counts.cached,
        step_s=step_s,
        sequence_blocks=counts.held - owners.listed,
        hold_blocks=owners.count(Owner.HOLD),
        landing_blocks=owners.count(Owner.LANDING),
        quarantine_blocks=owners.count(Owner.QUARANTINE),
        handoffs_acked=handoffs.acked,
        handoffs_failed=handoffs.failed,
        checksum_failures=handoffs.checksum_failures,
    )
