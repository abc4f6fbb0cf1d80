"""Offers that ended before an answer: a GRANT may be on its way, and the receives that it speaks of must complete.

Only so many blocks as were offered are owed, once; a grant for anything else is owed nothing, whoever sends it.
"""

from __future__ import annotations

from collections import OrderedDict

from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.wire import Handle

MAX_CROSSED = 4096  # older ones are forgotten: their peer fails the hand-off by its own timer


class CrossedOffers:
    """Of one session; the newest `MAX_CROSSED`."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Handle, int] = OrderedDict()

    def note(self, ended: SendHandoff | None) -> None:
        """A hand-off that is over, if there was one."""
        if ended is None or ended.granted:
            return
        self._blocks[ended.handle] = ended.offer.num_blocks
        if len(self._blocks) > MAX_CROSSED:
            self._blocks.popitem(last=False)

    def take(self, handle: Handle) -> int:
        """Blocks that a late grant may speak of; 0 for a hand-off that is none of these."""
        return self._blocks.pop(handle, 0)
