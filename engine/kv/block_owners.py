"""Why blocks are held besides by sequences: for a peer that reads them, for KV that arrives, or until it is certain
that nobody touches them any more.

A block may be shared, by prefix or by a hand-off that reads what a sequence still uses. It counts once, for the
strictest of its reasons: what says most about when it may be written again. Held blocks that are not listed here belong
to sequences, so with the free and the cached ones every block has exactly one owner.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Owner(enum.IntEnum):
    """Reasons, strictest first."""

    QUARANTINE = 0  # of a hand-off that is over, while operations may still touch them
    LANDING = 1  # KV arrives in them, or waits for the rest of its sequence
    HOLD = 2  # computed here, held until the peer has them


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

    def blocks(self) -> frozenset[int]:
        return frozenset(self._reasons)


def _strictest(reasons: list[int]) -> Owner:
    return next(owner for owner in Owner if reasons[owner])
