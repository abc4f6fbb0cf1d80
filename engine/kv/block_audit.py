"""Proof that every block of an engine has exactly one owner: all holders are counted and compared with the books."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvbaton.engine.kv.block_owners import BlockAudit, BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import BrokenInvariant, KVManager

MAX_PROBLEMS = 20


def audit_blocks(
    kv: KVManager,
    owners: BlockOwners,
    sequences: Iterable[Sequence[int]],
    handoffs: Iterable[Sequence[int]],
    written: Iterable[int] = (),
) -> BlockAudit:
    """`sequences` are the block tables of all sequences, `handoffs` the blocks that hand-offs hold besides, and
    `written` what the device is writing."""
    problems = _broken(kv)
    problems += [f"block {block} is being written and nobody holds it" for block in written if not kv.holders(block)]
    of_sequences = Counter(block for table in sequences for block in table)
    of_handoffs = Counter(block for blocks in handoffs for block in blocks)
    counts: Counter[Owner | None] = Counter()
    for block_id in range(kv.num_blocks):
        owner, holders = owners.of(block_id), kv.holders(block_id)
        known = of_sequences[block_id] + of_handoffs[block_id]
        if holders != known:
            problems.append(f"block {block_id} has {holders} holders, {known} of them are known")
        if (owner is not None) != (of_handoffs[block_id] > 0):
            problems.append(f"block {block_id} is held by {of_handoffs[block_id]} hand-offs but listed as {owner!r}")
        if holders:
            counts[owner] += 1
    pool = kv.counts()
    audit = BlockAudit(
        free=pool.free,
        cache=pool.cached,
        sequence=counts[None],
        hold=counts[Owner.HOLD],
        landing=counts[Owner.LANDING],
        quarantine=counts[Owner.QUARANTINE],
        total=kv.num_blocks,
    )
    problems += _sums(audit, owners)
    return replace(audit, problems=tuple(problems[:MAX_PROBLEMS]))


def _broken(kv: KVManager) -> list[str]:
    try:
        kv.check()
    except BrokenInvariant as error:
        return [str(error)]
    return []


def _sums(audit: BlockAudit, owners: BlockOwners) -> list[str]:
    problems: list[str] = []
    if audit.free + audit.cache + audit.held != audit.total:
        problems.append(f"owners do not add up to {audit.total}: {audit}")
    for owner, counted in (
        (Owner.HOLD, audit.hold),
        (Owner.LANDING, audit.landing),
        (Owner.QUARANTINE, audit.quarantine),
    ):
        if owners.count(owner) != counted:
            problems.append(f"{owners.count(owner)} blocks are booked as {owner.name}, {counted} are")
    return problems
