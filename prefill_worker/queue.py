"""Which waiting prompts get prefill tokens, and in what order: shortest remaining work first, with ageing.

A prompt's rank is its uncomputed tokens minus what its waiting time is worth, so a short prompt overtakes a long one
that has just begun, and a long one cannot be overtaken for ever: after `remaining / ageing_tokens_per_s` seconds it is
ahead of every newcomer. Sequences that were preempted were streaming already and go before all others, oldest first.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.sequence import Sequence, Status

AGEING_TOKENS_PER_S = 2000.0


class PrefillQueue:
    """Sequences with prompt tokens left to compute, started or not."""

    def __init__(self, ageing_tokens_per_s: float = AGEING_TOKENS_PER_S) -> None:
        self._ageing = ageing_tokens_per_s
        self._items: dict[int, Sequence] = {}  # by identity: a Sequence has no value equality
        self._for_peers: set[int] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items.values())

    def __contains__(self, seq: Sequence) -> bool:
        return id(seq) in self._items

    def add(self, seq: Sequence, for_peer: bool = False) -> None:
        """`for_peer`: its blocks will wait for another engine once they are computed."""
        self._items[id(seq)] = seq
        if for_peer:
            self._for_peers.add(id(seq))

    def remove(self, seq: Sequence) -> None:
        del self._items[id(seq)]
        self._for_peers.discard(id(seq))

    def for_peer(self, seq: Sequence) -> bool:
        return id(seq) in self._for_peers

    def ordered(self, now: float) -> list[Sequence]:
        """Most urgent first; ties by arrival."""
        return sorted(self._items.values(), key=lambda seq: self._rank(seq, now))

    @property
    def preempted(self) -> bool:
        """A stream that has begun waits here for blocks: it goes before all that have not."""
        return any(seq.status is Status.PREEMPTED for seq in self._items.values())

    def uncomputed_tokens(self) -> int:
        return sum(seq.num_uncomputed for seq in self._items.values())

    def _rank(self, seq: Sequence, now: float) -> tuple[int, float, float]:
        if seq.num_outputs > len(seq.request.emitted) or seq.status is Status.PREEMPTED:
            return (0, seq.arrival_s, 0.0)
        return (1, seq.num_uncomputed - self._ageing * (now - seq.arrival_s), seq.arrival_s)


class HoldLimit:
    """How much of the pool may wait for other engines: prompts computed for them hold blocks until the peer has them.

    Asked before a prompt for another engine is begun; `begin_step` comes first in each step.
    """

    def __init__(self, num_blocks: int, limits: BatchConfig) -> None:
        self._most_blocks = int(num_blocks * limits.max_held_fraction)
        self._most_handoffs = limits.max_handoffs
        self._blocks = 0
        self._handoffs = 0

    def begin_step(self, num_handoffs: int, num_blocks: int) -> None:
        """So many hand-offs are open, and hold so many blocks."""
        self._handoffs, self._blocks = num_handoffs, num_blocks

    def admits(self, num_blocks: int) -> bool:
        """Whether one more prompt may begin; the only one always may, so that none is too large for ever."""
        if not self._handoffs:
            return True
        return self._blocks + num_blocks <= self._most_blocks and self._handoffs < self._most_handoffs

    def took(self, num_blocks: int) -> None:
        """A prompt has begun."""
        self._handoffs += 1
        self._blocks += num_blocks
