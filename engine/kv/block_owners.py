"""Why blocks are held: by sequences, for a peer that reads them, for KV that arrives, or until it is certain that
nobody touches them any more. And the proof that the books are right: every holder counted, block by block.

A block may be shared, by prefix or by a hand-off that reads what a sequence still uses. It counts once, for the
strictest of its reasons: what says most about when it may be written again. Held blocks that are not listed here belong
to sequences, so with the free and the cached ones every block has exactly one owner.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvbaton.engine.kv.kv_manager import BrokenInvariant, KVManager

MAX_PROBLEMS = 20


class Owner(enum.IntEnum):
    """Reasons, strictest first."""

    QUARANTINE = 0  # of a hand-off that is over, while operations may still touch them
    LANDING = 1  # KV arrives in them, or waits for the rest of its sequence
    HOLD = 2  # computed here, held until the peer has them


class BlockOwners:
    """Reasons by block, with the totals kept up to date: reading them costs nothing in a step."""

    def __init__(self) -> None:
        self._reasons: dict[int, list[int]] = {}  # how often each block is held for each reason
        self._totals = [0] * len(Owner)

    def count(self, owner: Owner) -> int:
        """Blocks for which this is the strictest reason."""
        return self._totals[owner]

    @property
    def listed(self) -> int:
        return sum(self._totals)

    def of(self, block_id: int) -> Owner | None:
        """The strictest reason, None for a block that only sequences hold, if anybody does."""
        reasons = self._reasons.get(block_id)
        return None if reasons is None else _strictest(reasons)

    def change(self, before: Owner | None, after: Owner | None, block_ids: Sequence[int]) -> None:
        """Blocks were held for `before` (None: not listed for this) and are now for `after`."""
        for block_id in block_ids:
            reasons = self._reasons.setdefault(block_id, [0] * len(Owner))
            if any(reasons):
                self._totals[_strictest(reasons)] -= 1
            if before is not None:
                reasons[before] -= 1
            if after is not None:
                reasons[after] += 1
            if any(reasons):
                self._totals[_strictest(reasons)] += 1
            else:
                del self._reasons[block_id]


def _strictest(reasons: list[int]) -> Owner:
    return next(owner for owner in Owner if reasons[owner])


@dataclass(frozen=True, slots=True)
class Holding:
    """One holder's blocks, each held once, and for what reason; None for a sequence's own."""

    blocks: Sequence[int]
    owner: Owner | None = None


@dataclass(frozen=True, slots=True)
class BlockAudit:
    """Every block of a pool by its one owner. `problems` lists what contradicts the books; it must be empty."""

    free: int
    cache: int
    sequence: int
    hold: int
    landing: int
    quarantine: int
    total: int
    problems: tuple[str, ...] = ()

    @property
    def held(self) -> int:
        return self.sequence + self.hold + self.landing + self.quarantine


def audit_blocks(
    kv: KVManager, owners: BlockOwners, holdings: Iterable[Holding], written: Iterable[int] = ()
) -> BlockAudit:
    """Compare what all holders hold (`holdings`) with the books; `written` are blocks that the device is writing."""
    problems = _broken(kv)
    problems += [f"block {block} is being written and nobody holds it" for block in written if not kv.holders(block)]
    known: Counter[int] = Counter()
    reasons: dict[int, set[Owner]] = {}
    for holding in holdings:
        known.update(holding.blocks)
        if holding.owner is not None:
            for block in holding.blocks:
                reasons.setdefault(block, set()).add(holding.owner)
    counts: Counter[Owner | None] = Counter()
    for block_id in range(kv.num_blocks):
        listed, holders = owners.of(block_id), kv.holders(block_id)
        if holders != known[block_id]:
            problems.append(f"block {block_id} has {holders} holders, {known[block_id]} of them are known")
        if listed is not min(reasons.get(block_id, ()), default=None):
            problems.append(f"block {block_id} is held for {sorted(reasons.get(block_id, ()))}, listed as {listed!r}")
        if holders:
            counts[listed] += 1
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
