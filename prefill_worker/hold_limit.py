"""How much of the pool may wait for other engines: prompts computed for them hold blocks until the peer has them."""

from __future__ import annotations

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.outgoing import OutgoingHandoffs


class HoldLimit:
    """Asked before a prompt for another engine is begun. `begin_step` comes first in each step."""

    def __init__(self, outgoing: OutgoingHandoffs, num_blocks: int, limits: BatchConfig) -> None:
        self._outgoing = outgoing
        self._most = int(num_blocks * limits.max_held_fraction)
        self._max_handoffs = limits.max_handoffs
        self._room = 0

    def begin_step(self) -> None:
        self._room = self._most - self._outgoing.num_blocks()

    def admits(self, num_blocks: int) -> bool:
        """Whether one more prompt may begin; the only one always may, so that none is too large for ever."""
        if not len(self._outgoing):
            return True
        return num_blocks <= self._room and len(self._outgoing) < self._max_handoffs

    def took(self, num_blocks: int) -> None:
        """A prompt has begun."""
        self._room -= num_blocks
